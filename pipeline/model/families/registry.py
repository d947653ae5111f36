"""All families by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from data_prep.common.errors import UserError
from data_prep.common.plugins import NotOurs, Registry, same_name
from pipeline.model.families.decoders import DECODERS
from pipeline.model.families.dinov2 import DINOV2
from pipeline.model.families.gemma import GEMMAS
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.siglip2 import SIGLIP2
from pipeline.model.families.towers import TOWERS
from pipeline.model.families.vision import VisionFamily
from pipeline.model.families.vlm_towers import VLM_TOWERS

F = TypeVar("F", LlmFamily, VisionFamily)


def _accept(kind: type[F]) -> Callable[[str, object], F]:
    """Return the check for a descriptor of one kind; the group holds both kinds."""

    def accept(name: str, found: object) -> F:
        if isinstance(found, kind):
            return same_name(name, found, "model_type")
        if isinstance(found, (LlmFamily, VisionFamily)):
            raise NotOurs
        raise UserError(f"it is a {type(found).__name__}, not an LlmFamily or a VisionFamily")

    return accept


LLM_FAMILIES: Registry[LlmFamily] = Registry(
    "mma.families",
    "decoder family",
    {family.model_type: family for family in sorted((*DECODERS, *GEMMAS), key=lambda family: family.model_type)},
    _accept(LlmFamily),
)
"""Decoders by ``model_type``."""
VISION_FAMILIES: Registry[VisionFamily] = Registry(
    "mma.families",
    "vision tower",
    {family.model_type: family for family in (*TOWERS, SIGLIP2, *DINOV2, *VLM_TOWERS)},
    _accept(VisionFamily),
)
"""Vision towers by ``model_type``."""
_EXPERTS = "only dense decoders are; it is a mixture of experts"
REFUSED: Mapping[str, str] = {
    "gemma3n": "its layers read a second embedding of the tokens and share keys and values across pipeline stages",
    "gemma3n_text": "its layers read a second embedding of the tokens and share keys and values across pipeline stages",
    "gpt_oss": "its attention has learned sinks, which the attention backends do not compute",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
"""Families that people ask for and that would not be exact, with the reason."""
