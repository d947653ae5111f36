"""SigLIP 2 NaFlex (arXiv 2502.14786): patches of images of any shape.

N patches of all images, P patches of one image, B images, S side of a patch, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.attention import register
from pipeline.model.families.towers import TEXT_AND_POOLING
from pipeline.model.families.vision import VisionFamily
from pipeline.model.patches import PatchLayout


class Siglip2(VisionFamily):
    """SigLIP 2 NaFlex without its pooling head.

    Its position embeddings are interpolated to the grid of each image. Packs of images of one size give it squares.
    """

    resample = "bilinear"
    native = True
    not_read = TEXT_AND_POOLING

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Build no pooling head."""
        return {**raw, "vision_use_head": False}

    def problem(self, config: PreTrainedConfig) -> str:
        """Refuse patches that are not square, and position embeddings that are not a square of them."""
        if not isinstance(config.patch_size, int):
            return "patch_size must be a whole number (square patches)"
        if math.isqrt(config.num_patches) ** 2 != config.num_patches:
            return f"num_patches {config.num_patches} is not a square number"
        return ""

    def size_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square that has its own number of patches, in pixels."""
        return math.isqrt(config.num_patches) * int(config.patch_size)

    def build(self, config: PreTrainedConfig, *, whole: bool = False) -> PreTrainedModel:
        """Build the tower with attention that takes plans."""
        tower = super().build(config)
        tower.config._attn_implementation = register()
        return tower

    def call(self, tower: nn.Module, pixels_B3SS: torch.Tensor, *, resized: bool) -> torch.Tensor:
        """Return the features of square images, [B, P, D]."""
        patch: int = tower.config.patch_size  # type: ignore[union-attr, assignment]
        rows = pixels_B3SS.shape[-1] // patch
        pixels_B3SS = pixels_B3SS[:, :, : rows * patch, : rows * patch]
        cut = torch.unflatten(torch.unflatten(pixels_B3SS, 3, (rows, patch)), 2, (rows, patch))
        patches_BPX = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        mask_BP = torch.ones(patches_BPX.shape[:2], dtype=torch.long, device=patches_BPX.device)
        shapes_B2 = torch.full((len(patches_BPX), 2), rows)
        out = tower(pixel_values=patches_BPX, pixel_attention_mask=mask_BP, spatial_shapes=shapes_B2)
        features: torch.Tensor = out.last_hidden_state
        return features

    def packed(self, tower: nn.Module, patches_N3SS: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """Return the features of packed patches, [N, D].

        Only the embedding of patches is padded to the largest image: it is one call on every rank, as ZeRO-3 requires.
        """
        parts = torch.split(patches_N3SS.permute(0, 2, 3, 1).flatten(1), layout.lengths)
        embedded_BPD = tower.get_submodule("embeddings")(
            pad_sequence([*parts], batch_first=True), torch.tensor(layout.grids)
        )
        hidden_ND = torch.cat([own[:length] for own, length in zip(embedded_BPD, layout.lengths, strict=True)])
        encoder = tower.get_submodule("encoder")
        hidden_1ND = encoder(inputs_embeds=hidden_ND[None], attention_mask=layout.plan).last_hidden_state
        features: torch.Tensor = tower.get_submodule("post_layernorm")(hidden_1ND)[0]
        return features


SIGLIP2 = Siglip2("siglip2_vision_model", composites=("siglip2",), prefixes=("vision_model.",))
