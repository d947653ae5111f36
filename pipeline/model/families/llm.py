"""What a family of decoders needs beyond its transformers code: one descriptor per ``model_type``.

T packed tokens of one micro-batch, D hidden width. The names of parameters are global, whatever the family calls them:
``model.embed_tokens.weight``, ``model.layers.<i>.*``, ``model.norm.weight``, ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.attention.gate import PROJECTIONS, QueryKey


class Piece(NamedTuple):
    """Where a parameter lies in a folder of weights: a tensor, or one of its equal parts along the first dimension."""

    key: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class DecoderParts:
    """The modules of a language model that stages are made of."""

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    lm_head: nn.Module

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (global name, module) of every part with parameters, in the model's order."""
        yield "model.embed_tokens", self.embed_tokens
        yield from ((f"model.layers.{index}", layer) for index, layer in enumerate(self.layers))
        yield "model.norm", self.norm
        yield "lm_head", self.lm_head


class LlmFamily:
    """A decoder-only family whose layers, rotary embedding and head are called exactly as in transformers.

    The defaults fit Llama and everything shaped like it. A subclass changes what differs.
    """

    rotary_per_layer_type = False
    """The rotary embedding takes ``layer_type``; each type of layer has its own frequencies."""

    fewest_layers = 1
    extra_keys: frozenset[str] = frozenset()
    """Keys that its config reads but does not declare."""

    def __init__(
        self, model_type: str, *, composites: tuple[str, ...] = (), query_key: QueryKey | None = PROJECTIONS
    ) -> None:
        """Describe a family.

        Args:
            model_type: of its transformers config.
            composites: ``model_type`` of multimodal models that hold this decoder, under the key ``text_config``.
            query_key: the modules whose outputs are queries and keys before the rotary embedding, for ``model.gate``;
                None: there are none, and the gate is refused.
        """
        self.model_type, self.composites, self.query_key = model_type, composites, query_key

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_type!r})"

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The family's transformers config."""
        found: type[PreTrainedConfig] = CONFIG_MAPPING[self.model_type]
        return found

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The family's transformers model with a language-model head."""
        found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class]
        return found

    # ---- config

    def prepared(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config's keys, with those that training needs otherwise than published."""
        # Special tokens belong to the tokenizer. If set here, the padding row would never be trained, and Phi-3's
        # padding is also its end-of-text token.
        return {**raw, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

    def problem(self, config: PreTrainedConfig) -> str:
        """Return why a model of this config cannot be trained exactly, naming the key; ``""`` if it can."""
        return ""

    def longest_segment(self, config: PreTrainedConfig) -> int | None:
        """Longest sample in tokens: ``max_position_embeddings``, or the short regime of longrope models; None: any.

        Longrope (arXiv 2402.13753) switches its frequencies for the whole row when one position passes the short limit,
        so a long sample would change its neighbours.
        """
        limit: int | None = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            short = rope.get("original_max_position_embeddings") or limit
            return min(x for x in (limit, short) if x is not None)
        return limit

    def sliding_window(self, config: PreTrainedConfig) -> int | None:
        """Return the shortest window of its layers in tokens; None if every layer sees everything."""
        window: int | None = getattr(config, "sliding_window", None)
        return window

    def head_size(self, config: PreTrainedConfig) -> int:
        """Return the width of one attention head, the largest if they differ."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def feed_forward_width(self, config: PreTrainedConfig) -> int:
        """Return the width of a layer's feed-forward activations, for memory estimates."""
        return int(getattr(config, "intermediate_size", 4 * config.hidden_size))

    # ---- modules

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Build the whole language model; called on the meta device. Parameters without gradient stay constant."""
        return self.model_class(config)

    def parts(self, model: PreTrainedModel) -> DecoderParts:
        """Return the model's modules."""
        inner = model.model
        return DecoderParts(inner.embed_tokens, inner.layers, inner.norm, inner.rotary_emb, model.lm_head)

    def rotary(self, model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
        """Return a rotary embedding with values, on the CPU; it has no parameters."""
        made: nn.Module = type(self.parts(model).rotary)(config=config)
        return made

    def assemble(self, model: PreTrainedModel, parts: DecoderParts) -> None:
        """Put the modules of a trained stage into a model built on the meta device; ``generate`` runs it."""
        inner = model.model
        inner.embed_tokens, inner.layers, inner.norm, inner.rotary_emb = (
            parts.embed_tokens, parts.layers, parts.norm, parts.rotary,
        )  # fmt: skip
        model.lm_head.weight = parts.lm_head.get_parameter("weight")

    # ---- forward

    def input_scale(self, config: PreTrainedConfig) -> float | None:
        """Factor of everything that enters the first layer, image tokens too; None: no factor."""
        return None

    def logit_scale(self, config: PreTrainedConfig) -> float:
        """Factor of the logits."""
        return 1.0

    def logit_softcap(self, config: PreTrainedConfig) -> float | None:
        """Soft cap of the logits; None: no cap."""
        cap: float | None = getattr(config, "final_logit_softcapping", None)
        return cap

    def rotary_kind(self, config: PreTrainedConfig, layer: int) -> str:
        """Return which rotary embedding a layer uses; ``""`` where all layers share one."""
        return str(config.layer_types[layer]) if self.rotary_per_layer_type else ""

    def position_embeddings(
        self, rotary: nn.Module, hidden_1TD: torch.Tensor, positions_1T: torch.Tensor, kind: str
    ) -> Any:
        """Return what a layer of ``kind`` takes as ``position_embeddings``: (cos, sin)."""
        return rotary(hidden_1TD, positions_1T, kind) if kind else rotary(hidden_1TD, positions_1T)

    # ---- weights

    def homes(self) -> tuple[str, ...]:
        """Prefixes that the decoder's tensors may have in a folder; the first one found holds the decoder."""
        nested = ("language_model.model.", "model.language_model.") if self.composites else ()
        return (*nested, "model.")

    def pieces(self, name: str, home: str) -> Iterator[Piece]:
        """Yield where a parameter of this global name may lie in a folder, the likeliest first."""
        inner = name.removeprefix("model.")
        if inner != name:
            yield Piece(home + inner)
        else:
            yield from (Piece(name), Piece(home.removesuffix("model.") + name))

    def unread(self, key: str, home: str) -> bool:
        """Return whether a folder's tensor is rightly not read: buffers, and the other parts of a multimodal model."""
        other = home != self.homes()[-1] and not key.startswith(home) and "lm_head" not in key
        return key.endswith("inv_freq") or other
