"""Converts decoded images to the pixels a vision tower expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling

from data_prep.common.errors import UserError


@dataclass(frozen=True)
class Preprocess:
    """Resize to a square, scale to 0..1 and normalise, as in the tower's own training.

    Images are resized without keeping their aspect ratio, never cropped: crops and flips would change the positions,
    counts and written words that questions ask about. Augmentations that a sample's text allows are recorded in its
    packed row (``data_prep.images.augment``).

    Raises UserError when mean or std are not three numbers each, or a std is not above 0.
    """

    size_px: int
    """Side of the square, in pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, for values in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, for values in 0..1."""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"image mean {self.mean} and std {self.std} must be three numbers each, std above 0")

    def batch(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the pixels of n images, float32[n, 3, S, S] with S = ``size_px``."""
        if not images:
            return torch.empty(0, 3, self.size_px, self.size_px)
        return torch.from_numpy(np.stack([self._one(image) for image in images]))

    def _one(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        squashed = image.convert("RGB").resize((self.size_px, self.size_px), Resampling.BICUBIC)
        values = np.asarray(squashed, dtype=np.float32) / 255.0
        normal = (values - np.asarray(self.mean, dtype=np.float32)) / np.asarray(self.std, dtype=np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Preprocess:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(int(raw["size_px"]), tuple(raw["mean"]), tuple(raw["std"]))
