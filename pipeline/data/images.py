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
from data_prep.packs import PackRow
from pipeline.model.preprocess import Preprocess


class ImageReference(NamedTuple):
    """An image of a packed row."""

    store_row: int
    """Row of the image store."""
    augmentation: npt.NDArray[np.int16] | None
    """As the packed row records it; None = as it is."""


def images_of(rows: Sequence[PackRow]) -> Iterator[ImageReference]:
    """Yield the images of rows, in order."""
    for row in rows:
        for number, index in enumerate(row.image_row.tolist()):
            yield ImageReference(index, None if row.augmentation is None else row.augmentation[number])


@dataclass(frozen=True)
class ImageLoader:
    """Decodes an image once and resizes it for every vision tower; safe to call from several threads."""

    store: ImageStore
    towers: Sequence[Preprocess]
    draft: bool = False
    """Decode JPEGs at a reduced size, see ``decode_rgb``."""

    def load(self, reference: ImageReference) -> tuple[npt.NDArray[np.uint8], ...]:
        """Return an image for each tower, uint8[S, S, 3]. Raises UserError naming an image that cannot be decoded."""
        image = self._decoded(reference)
        if reference.augmentation is not None:
            image = apply_augmentation(image, reference.augmentation)
        return tuple(tower.resize(image) for tower in self.towers)

    def _decoded(self, reference: ImageReference) -> Image.Image:
        draft_px = self._draft_px(reference.augmentation) if self.draft else 0
        try:
            return decode_rgb(self.store.read(reference.store_row), draft_px=draft_px)
        except BadImage as error:
            raise UserError(
                f"image {reference.store_row} of the image store cannot be decoded ({error}): run mma-prep verify"
            ) from error

    def _draft_px(self, augmentation: npt.NDArray[np.int16] | None) -> int:
        """Return the shortest sides of the whole image whose kept part is still as large as the towers' input."""
        side = max(tower.size_px for tower in self.towers)
        kept = UNIT if augmentation is None else int(augmentation[3:].min())
        return -(-side * UNIT // kept)


def images_per_core_s(loader: ImageLoader, references: Sequence[ImageReference]) -> float:
    """Return the images a second that one thread decodes and resizes, measured on these images, at least one."""
    loader.load(references[0])  # opens the store, imports codecs
    began = time.thread_time()
    for reference in references:
        loader.load(reference)
    return len(references) / max(time.thread_time() - began, 1e-9)
