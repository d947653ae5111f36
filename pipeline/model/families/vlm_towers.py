"""Towers that only vision-language models have: those of Idefics 3, SmolVLM and InternVL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline.model.families.vision import VisionFamily


class Idefics3Tower(VisionFamily):
    """SigLIP with positions by place, which fit any number of patches without interpolation."""

    def call(self, tower: nn.Module, pixels_B3SS: torch.Tensor, *, resized: bool) -> torch.Tensor:
        """Return the features of the patches."""
        features: torch.Tensor = tower(pixel_values=pixels_B3SS).last_hidden_state
        return features


class InternVLTower(VisionFamily):
    """InternViT: a class token before the patches, scaled residual branches; its sizes are (height, width) pairs."""

    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    encoder = "encoder.layer"

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Build no mask token, which only its own training uses."""
        return {**raw, "use_mask_token": False}

    def problem(self, config: PreTrainedConfig) -> str:
        """Refuse images or patches that are not square."""
        sizes = {"image_size": tuple(config.image_size), "patch_size": tuple(config.patch_size)}
        for name, value in sizes.items():
            if len(value) != 2 or value[0] != value[1] or not isinstance(value[0], int):
                return f"{name}={list(value)} must be two equal whole numbers (square images)"
        if sizes["image_size"][0] < sizes["patch_size"][0]:
            return f"image_size {sizes['image_size'][0]} is smaller than patch_size {sizes['patch_size'][0]}"
        return ""

    def size_px(self, config: PreTrainedConfig) -> int:
        """Return the side of its images."""
        return int(config.image_size[0])

    def grid(self, config: PreTrainedConfig, size_px: int) -> tuple[int, int]:
        """Return the patches of a square image."""
        side = size_px // int(config.patch_size[0])
        return side, side

    def extra_tokens(self, config: PreTrainedConfig) -> int:
        """Return 1: the class token."""
        return 1

    def call(self, tower: nn.Module, pixels_B3SS: torch.Tensor, *, resized: bool) -> torch.Tensor:
        """Return all features; positions are interpolated without being asked to."""
        features: torch.Tensor = tower(pixel_values=pixels_B3SS).last_hidden_state
        return features


VLM_TOWERS = (Idefics3Tower("idefics3_vision"), InternVLTower("internvl_vision"), Idefics3Tower("smolvlm_vision"))
