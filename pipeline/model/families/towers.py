"""Vision towers trained with text: SigLIP (also SigLIP 2 of fixed resolution, which is the same code) and CLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.model.families.vision import VisionFamily

TEXT_AND_POOLING = re.compile(
    r"(text_model\.|logit_|visual_projection|text_projection|text_embed|head\.|post_layernorm\.|.*position_ids$)"
)


class Siglip(VisionFamily):
    """SigLIP (arXiv 2303.15343) without its pooling head, which no connector uses."""

    not_read = TEXT_AND_POOLING
    last_norm = True

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Build no pooling head."""
        return {**raw, "vision_use_head": False}


class Clip(VisionFamily):
    """CLIP (arXiv 2103.00020): a class token before the patches, and a last norm for its pooled output only."""

    mean, std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    not_read = TEXT_AND_POOLING
    last_norm = False

    def extra_tokens(self, config: PreTrainedConfig) -> int:
        """Return 1: the class token."""
        return 1

    def build(self, config: PreTrainedConfig, *, whole: bool = False) -> PreTrainedModel:
        """Build the tower without the norm of its pooled output, unless ``whole``."""
        tower = super().build(config)
        if not whole:
            tower.post_layernorm = nn.Identity()
        return tower


TOWERS = (
    Clip("clip_vision_model", composites=("clip",), prefixes=("vision_model.",)),
    Siglip("siglip_vision_model", composites=("siglip",), prefixes=("vision_model.",)),
)
