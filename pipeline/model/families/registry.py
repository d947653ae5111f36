"""All families by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.model.families.decoders import DECODERS
from pipeline.model.families.gemma import GEMMAS
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.towers import TOWERS
from pipeline.model.families.vision import VisionFamily

LLM_FAMILIES: Mapping[str, LlmFamily] = {
    family.model_type: family for family in sorted((*DECODERS, *GEMMAS), key=lambda family: family.model_type)
}
"""Decoder families."""
VISION_FAMILIES: Mapping[str, VisionFamily] = {family.model_type: family for family in TOWERS}
"""Vision towers."""
