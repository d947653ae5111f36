"""Pixels against the library's own image processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data_prep.common.errors import UserError
from pipeline.model.preprocess import Preprocess, stacked


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [picture(64, 48), picture(31, 200), picture(32, 32), picture(5, 3)]


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("size", [32, 56])
def test_pixels_equal_those_of_transformers_without_cropping(family: str, size: int) -> None:
    square = {"height": size, "width": size}
    if family == "siglip":
        theirs, mine = SiglipImageProcessorPil(size=square), Preprocess(size)
    else:
        theirs = CLIPImageProcessorPil(size=square, do_center_crop=False)
        mine = Preprocess(size, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    wanted = theirs(IMAGES, return_tensors="pt")["pixel_values"]
    got = mine.batch(IMAGES)
    assert got.dtype == torch.float32 and got.shape == (len(IMAGES), 3, size, size)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), tuple(OPENAI_CLIP_MEAN)])
def test_bytes_normalised_on_the_device_equal_those_normalised_in_numpy_to_the_bit(mean: tuple[float, ...]) -> None:
    settings = Preprocess(256, mean, tuple(OPENAI_CLIP_STD))  # type: ignore[arg-type]
    square = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    square[0, :, :] = np.arange(256)[:, None]  # every value
    values = square.astype(np.float32) / np.float32(255)
    wanted = (values - np.array(mean, np.float32)) / np.array(OPENAI_CLIP_STD, np.float32)
    pixels = stacked([square, square])
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 3, 256, 256))
    got = settings.normalize(pixels)
    assert got.is_contiguous() and np.array_equal(got[1].numpy(), wanted.transpose(2, 0, 1))


def test_no_images_give_an_empty_batch() -> None:
    assert Preprocess(8).batch([]).shape == (0, 3, 8, 8)


def test_settings_survive_json() -> None:
    settings = Preprocess(8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocess.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("std", [(0.5, 0.5), (0.5, 0.0, 0.5)])
def test_impossible_settings_are_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="three numbers"):
        Preprocess(8, (0.5, 0.5, 0.5), std)  # type: ignore[arg-type]
