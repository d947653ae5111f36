"""Cuts images into the views that a tower reads: the image itself, or its tiles and a thumbnail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from PIL.Image import Resampling

from data_prep.media.spec import AnyresImages, Extent, MediaSpec
from pipeline.model.preprocess import Preprocess


def view_pixels(
    preprocess: Preprocess, images: Sequence[Image.Image], extents: Sequence[Extent | None], spec: MediaSpec
) -> torch.Tensor:
    """Return the normalised pixels of all views of images, float32[views, 3, S, S], in the order of their tokens."""
    pairs = zip(images, extents, strict=True)
    side = preprocess.size_px
    return preprocess.batch([view for image, extent in pairs for view in views_of(image, extent, spec, side)])


def views_of(image: Image.Image, extent: Extent | None, spec: MediaSpec | None, side: int) -> Iterator[Image.Image]:
    """Yield the views of an image: itself, or its tiles row by row with the whole image before or after them.

    Args:
        image: decoded and augmented.
        extent: of the image; None: one view.
        spec: how images become tokens; None: each is one view.
        side: of the tower's pictures, in pixels. Tiles have that size, the image itself any.
    """
    if spec is None or extent is None or not isinstance(spec.image, AnyresImages):
        yield image
        return
    rows, columns = extent.view
    several = rows * columns > 1
    if several and spec.image.thumbnail == "first":
        yield image
    whole = image.convert("RGB").resize((columns * side, rows * side), Resampling.BICUBIC)
    for row, column in itertools.product(range(rows), range(columns)):
        yield whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    if several and spec.image.thumbnail == "last":
        yield image
