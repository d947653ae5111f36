"""Decoders shaped like Llama, and the few that differ in one number."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pipeline.attention.gate import FUSED, NORMS
from pipeline.model.families.llm import LlmFamily


class Granite(LlmFamily):
    """Granite scales what enters its layers, image tokens too, and divides its logits (arXiv 2412.15480, muP)."""

    def input_scale(self, config: PreTrainedConfig) -> float | None:
        """Return ``embedding_multiplier``."""
        return float(config.embedding_multiplier)

    def logit_scale(self, config: PreTrainedConfig) -> float:
        """Return 1 / ``logits_scaling``."""
        return 1.0 / float(config.logits_scaling)


class Olmo3(LlmFamily):
    """OLMo 3: three layers of four have a window, and rotary frequencies of their own (arXiv 2512.13961)."""

    rotary_per_layer_type = True


DECODERS = (
    Granite("granite"),
    LlmFamily("llama"),
    LlmFamily("mistral", composites=("mistral3",)),
    LlmFamily("olmo2", query_key=NORMS),
    Olmo3("olmo3", query_key=NORMS),
    LlmFamily("phi3", query_key=FUSED),
    LlmFamily("qwen2"),
    LlmFamily("qwen3", query_key=NORMS),
    LlmFamily("smollm3"),
)
