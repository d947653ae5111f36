"""From a row's image references to the resized pixels of every vision tower."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.images.augment import UNIT, apply_augmentation
from data_prep.images.store import BadImage, ImageStore, decode_rgb
from data_prep.media.spec import Extent, MediaSpec, NativeImages, extents
from data_prep.packs import PackRow
from pipeline.model.preprocess import Preprocess
from pipeline.model.views import pictures_of


class ImageReference(NamedTuple):
    """An image of a packed row."""

    store_row: int
    """Row of the image store."""
    augmentation: npt.NDArray[np.int16] | None
    """As the packed row records it; None = as it is."""
    extent: Extent | None = None
    """As the packed row records it; None = one view."""


def images_of(rows: Sequence[PackRow]) -> Iterator[ImageReference]:
    """Yield the images of rows, in order."""
    for row in rows:
        found = [None] * len(row.image_row) if row.media is None else extents(row.media)
        for number, (index, extent) in enumerate(zip(row.image_row.tolist(), found, strict=True)):
            yield ImageReference(index, None if row.augmentation is None else row.augmentation[number], extent)


@dataclass(frozen=True)
class ImageLoader:
    """Decodes an image once and resizes it for every vision tower; safe to call from several threads."""

    store: ImageStore
    towers: Sequence[Preprocess]
    draft: bool = False
    """Decode JPEGs at a reduced size, see ``decode_rgb``."""
    spec: MediaSpec | None = None
    """How images become tokens; None: each is one view."""

    def load(self, reference: ImageReference) -> tuple[npt.NDArray[np.uint8], ...]:
        """Return the views of an image for each tower, uint8[views, S, S, 3], or its patches (native).

        Raises UserError naming an image that cannot be decoded.
        """
        image = self._decoded(reference)
        if reference.augmentation is not None:
            image = apply_augmentation(image, reference.augmentation)
        return tuple(pictures_of(image, reference.extent, self.spec, tower) for tower in self.towers)

    def _decoded(self, reference: ImageReference) -> Image.Image:
        draft_px = self._draft_px(reference) if self.draft else 0
        try:
            return decode_rgb(self.store.read(reference.store_row), draft_px=draft_px)
        except BadImage as error:
            raise UserError(
                f"image {reference.store_row} of the image store cannot be decoded ({error}): run mma-prep verify"
            ) from error

    def _draft_px(self, reference: ImageReference) -> int:
        """Return the shortest sides of the whole image whose kept part is still as large as the towers' input."""
        image = None if self.spec is None else self.spec.image
        side = image.patch_px if isinstance(image, NativeImages) else max(tower.size_px for tower in self.towers)
        side *= max(reference.extent.view) if reference.extent else 1
        kept = UNIT if reference.augmentation is None else int(reference.augmentation[3:].min())
        return -(-side * UNIT // kept)


def images_per_core_s(loader: ImageLoader, references: Sequence[ImageReference]) -> float:
    """Return the images a second that one thread decodes and resizes, measured on these images, at least one."""
    loader.load(references[0])  # opens the store, imports codecs
    began = time.thread_time()
    for reference in references:
        loader.load(reference)
    return len(references) / max(time.thread_time() - began, 1e-9)
