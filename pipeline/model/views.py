"""Cuts images into what a tower reads: the image itself, its tiles and a thumbnail, or its patches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from data_prep.media.spec import AnyresImages, Extent, MediaSpec, NativeImages
from pipeline.model.preprocess import Preprocess, stacked


def view_pixels(
    preprocess: Preprocess, images: Sequence[Image.Image], extents: Sequence[Extent | None], spec: MediaSpec
) -> torch.Tensor:
    """Return the normalised pictures of images, float32[n, 3, S, S], in the order of their tokens; at least one."""
    cut = [pictures_of(image, extent, spec, preprocess) for image, extent in zip(images, extents, strict=True)]
    return preprocess.normalize(stacked([*itertools.chain.from_iterable(cut)]))


def pictures_of(
    image: Image.Image, extent: Extent | None, spec: MediaSpec | None, preprocess: Preprocess
) -> npt.NDArray[np.uint8]:
    """Return the pictures that a tower reads of an image, uint8[n, S, S, 3].

    Args:
        image: decoded and augmented.
        extent: of the image; None: it is one view.
        spec: how images become tokens; None: each is one view.
        preprocess: of the tower.

    Returns:
        One picture, or tiles row by row with the whole image before or after them (S: side of the tower's images), or
        patches row by row (S: side of a patch).
    """
    if extent is not None and spec is not None and isinstance(spec.image, NativeImages):
        return _patches(image, extent, spec.image.patch_px, preprocess)
    if extent is not None and spec is not None and isinstance(spec.image, AnyresImages):
        return np.stack([preprocess.resize(view) for view in _tiles(image, extent, spec.image, preprocess)])
    return preprocess.resize(image)[None]


def _tiles(image: Image.Image, extent: Extent, spec: AnyresImages, preprocess: Preprocess) -> Iterator[Image.Image]:
    (rows, columns), side = extent.view, preprocess.size_px
    several = rows * columns > 1
    if several and spec.thumbnail == "first":
        yield image
    whole = preprocess.resize_to(image, columns * side, rows * side)
    for row, column in itertools.product(range(rows), range(columns)):
        yield whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    if several and spec.thumbnail == "last":
        yield image


def _patches(image: Image.Image, extent: Extent, side: int, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    rows, columns = extent.view
    whole = np.asarray(preprocess.resize_to(image, columns * side, rows * side))
    return whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
