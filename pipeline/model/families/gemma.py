"""Google's Gemma decoders: scaled embeddings (inside their embedding module), soft caps, windows, two rotary bases."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.attention.gate import NORMS
from pipeline.model.families.llm import LlmFamily


class Gemma3(LlmFamily):
    """Gemma 3: layers with a window and layers without have different rotary frequencies."""

    rotary_per_layer_type = True

    def problem(self, config: PreTrainedConfig) -> str:
        """Refuse the encoder variant."""
        if config.use_bidirectional_attention in (True, "all"):
            return (
                f"use_bidirectional_attention={config.use_bidirectional_attention!r} makes an encoder, in which every "
                "token sees the answers: use a decoder's config"
            )
        return ""


class Gemma4(Gemma3):
    """Gemma 4's dense decoders (31B, and 12B as ``gemma4_unified_text``).

    Layers without a window have heads of another size and may use their keys as values. A published factor per layer
    (``layer_scalar``) is a buffer in transformers; here it is a parameter without gradient, so that it is loaded,
    saved and exported with the rest. What a stage cannot compute by itself is refused.
    """

    extra_keys = frozenset({"per_layer_config", "global_head_dim", "num_global_key_value_heads"})

    def problem(self, config: PreTrainedConfig) -> str:
        """Refuse encoders, and the parts of the small and the sparse models."""
        if width := getattr(config, "hidden_size_per_layer_input", 0):
            return (
                f"hidden_size_per_layer_input={width}: every layer of Gemma 4's E2B and E4B reads a second embedding "
                "of the tokens, which only the first pipeline stage has: use the 12B or 31B, or set it to 0"
            )
        if shared := config.num_kv_shared_layers:
            return (
                f"num_kv_shared_layers={shared}: the last layers of Gemma 4's E2B and E4B read the keys and values of "
                "earlier layers, which another pipeline stage may hold: use the 12B or 31B, or set it to 0"
            )
        if getattr(config, "enable_moe_block", False):
            return "enable_moe_block: mixtures of experts (26B-A4B) are not supported: use the 12B or 31B"
        return super().problem(config)

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Make the factor of each layer a parameter without gradient."""
        model = super().build(config)
        for layer in self.parts(model).layers:
            factor = layer.get_buffer("layer_scalar")
            del layer.layer_scalar
            layer.register_parameter("layer_scalar", nn.Parameter(factor, requires_grad=False))
        return model

    def head_size(self, config: PreTrainedConfig) -> int:
        """Return the size of the largest heads, those of layers without a window."""
        return max(int(config.per_layer_config[layer].head_dim) for layer in range(config.num_hidden_layers))


GEMMAS = (
    LlmFamily("gemma"),
    LlmFamily("gemma2"),
    Gemma3("gemma3_text", composites=("gemma3",), query_key=NORMS._replace(heads_first=True)),
    Gemma4("gemma4_text", composites=("gemma4",), query_key=None),
    Gemma4("gemma4_unified_text", composites=("gemma4_unified",), query_key=None),
)
