"""DINOv2 (arXiv 2304.07193), with and without registers (arXiv 2309.16588): trained on images alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline.model.families.llm import Piece
from pipeline.model.families.vision import VisionFamily

_PUBLISHED = {
    "attention.q_proj": Piece("attention.attention.query"),
    "attention.k_proj": Piece("attention.attention.key"),
    "attention.v_proj": Piece("attention.attention.value"),
    "attention.o_proj": Piece("attention.output.dense"),
    "mlp.gate_proj": Piece("mlp.weights_in", 0, 2),
    "mlp.up_proj": Piece("mlp.weights_in", 1, 2),
    "mlp.down_proj": Piece("mlp.weights_out"),
}
"""What published folders call the modules that transformers has renamed since."""


class Dinov2(VisionFamily):
    """A class token and registers come before the patches; features are those of the last norm.

    Position embeddings are interpolated for any image size. Published models state the 518 px of their last training
    phase; set ``model.vision.size_px`` for smaller images.
    """

    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    encoder = "encoder.layer"
    not_read = re.compile(r"(embeddings\.mask_token$|classifier\.|pooler\.)")

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Build no mask token, which only its own training uses."""
        return {**raw, "use_mask_token": False}

    def extra_tokens(self, config: PreTrainedConfig) -> int:
        """Return 1 for the class token, plus the registers."""
        return 1 + int(getattr(config, "num_register_tokens", 0))

    def build(self, config: PreTrainedConfig, *, whole: bool = False) -> PreTrainedModel:
        """Build the tower without a mask token, also where the config cannot leave it out."""
        tower = super().build(config)
        if tower.embeddings.mask_token is not None:
            del tower.embeddings.mask_token
            tower.embeddings.register_buffer("mask_token", torch.zeros(1, config.hidden_size), persistent=False)
        return tower

    def call(self, tower: nn.Module, pixels_B3SS: torch.Tensor, *, resized: bool) -> torch.Tensor:
        """Return all features; positions are interpolated without being asked to."""
        features: torch.Tensor = tower(pixel_values=pixels_B3SS).last_hidden_state
        return features

    def pieces(self, name: str) -> Iterator[Piece]:
        """Yield transformers' name, then the published one."""
        yield Piece(name)
        for own, piece in _PUBLISHED.items():
            if f".{own}." in name:
                yield piece._replace(key=name.replace(own, piece.key))


DINOV2 = (
    Dinov2("dinov2", prefixes=("dinov2.",)),
    Dinov2("dinov2_with_registers", prefixes=("dinov2_with_registers.",)),
)
