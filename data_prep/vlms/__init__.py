"""Existing vision-language models as starting points: what their folders say, one descriptor per ``model_type``.

A descriptor is plain data: the configs of the parts, the connector, the names of the weights, the tokens of an image
and the chat template. Data preparation and training read the same one. A new model is one file here.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.vlms.base import IMAGE_PROCESSOR, PROCESSOR, Names, Vlm
from data_prep.vlms.gemma3 import GEMMA3
from data_prep.vlms.idefics3 import IDEFICS3
from data_prep.vlms.internvl import INTERNVL
from data_prep.vlms.llava import LLAVA

__all__ = ["IMAGE_PROCESSOR", "PROCESSOR", "REFUSED_VLMS", "VLMS", "Names", "Vlm"]

VLMS: Mapping[str, Vlm] = {one.model_type: one for one in (LLAVA, GEMMA3, *IDEFICS3, INTERNVL)}
"""Descriptors by ``model_type``."""
_ROTARY = "its decoder turns three position numbers per token (time, row, column) into rotary angles; stages have one"
_DEEPSTACK = "its decoder adds features of the tower to several layers, which other pipeline stages hold"
REFUSED_VLMS: Mapping[str, str] = {
    "idefics2": "its connector is a perceiver of its own",
    "llava_next": "its tiles are cut back to the image's shape, with a learned token after each row",
    "llava_onevision": "its tiles are cut back to the image's shape, with a learned token after each row",
    "paligemma": "its own training reads prompts with full attention: take its parts by model.llm and model.vision",
    "qwen2_vl": _ROTARY,
    "qwen2_5_vl": _ROTARY,
    "qwen3_vl": f"{_ROTARY}, and {_DEEPSTACK}",
    "qwen3_vl_moe": f"{_ROTARY}, and {_DEEPSTACK}",
}
"""Models that people ask for and that would not be exact, with the reason."""
