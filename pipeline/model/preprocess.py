"""Converts decoded images to the pixels a vision tower expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.Image import Resampling

from data_prep.common.errors import UserError

FILTERS = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR, "lanczos": Resampling.LANCZOS}


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
    resample: str = "bicubic"
    """Filter: ``bicubic``, ``bilinear`` or ``lanczos``."""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"image mean {self.mean} and std {self.std} must be three numbers each, std above 0")
        if self.resample not in FILTERS:
            raise UserError(f"image filter {self.resample!r} is not known: use one of {', '.join(FILTERS)}")

    def batch(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the pixels of n images, float32[n, 3, S, S] with S = ``size_px``."""
        if not images:
            return torch.empty(0, 3, self.size_px, self.size_px)
        return self.normalize(stacked([self.resize(image) for image in images]))

    def resize(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return an image resized to the square, uint8[S, S, 3]."""
        return np.asarray(self.resize_to(image, self.size_px, self.size_px))

    def resize_to(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return an image resized with the tower's filter; sizes in pixels."""
        return image.convert("RGB").resize((width, height), FILTERS[self.resample])

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8[n, 3, S, S] as normalised float32 on the same device, contiguous.

        The loader hands over bytes, a quarter of the memory and of the copy to a GPU. The operations are the same, in
        the same order, on every device: each is rounded correctly, so the result is equal to the bit.
        """
        whole, mean, std = _constants(self, pixels.device)
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.div_(whole).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("resample", "bicubic")}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Preprocess:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(int(raw["size_px"]), tuple(raw["mean"]), tuple(raw["std"]), raw.get("resample", "bicubic"))


def stacked(squares: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Return resized images uint8[S, S, 3] as one tensor uint8[n, 3, S, S], with the channels last in memory."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _constants(settings: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 255, mean and std, float32[3, 1, 1] on a device.

    They are tensors because CUDA divides by a number by multiplying with its rounded reciprocal. They are filled on the
    device: a copy would make the host wait for all earlier work.
    """

    def channels(values: Sequence[float]) -> torch.Tensor:
        return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])

    return channels([255.0] * 3), channels(settings.mean), channels(settings.std)
