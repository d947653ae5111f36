"""``generate`` with the training mask: one prefill pass under that mask, then causal decoding with a KV cache.

With a commit-respecting policy (see `pipeline.masks`) this computes exactly what training computed: a generated token
sees every earlier token, and no given token sees past the end of its own given run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from data_prep.common.modalities import TEXT
from pipeline.attention.gate import GatedKeys
from pipeline.attention.hf import MASK_INDEX
from pipeline.masks import Policy, Sidecars, dense_mask, position_ids
from pipeline.serving.flow import cut


class PrefillMask:
    """Mixin for a causal language model: ``generate(..., prefill_mask=bool[B, N, P, P])`` masks the prompt.

    N is 1, or the number of parts of a policy that changes with the layer; see :func:`assign_masks`.
    """

    config: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        prefill_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Replace transformers' mask by ``prefill_mask`` in the prefill pass, and only there."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration or prefill_mask is None:
            return inputs
        keys = prefill_mask.shape[-1]
        past = inputs.get("past_key_values")
        if past is not None:  # a static cache has its full length from the start
            keys = past.get_mask_sizes(prefill_mask.shape[-2], 0)[0]
        mask = F.pad(prefill_mask, (0, keys - prefill_mask.shape[-1]))
        return {**inputs, "attention_mask": by_layer_type(self.config, mask)}


def by_layer_type(config: Any, mask: torch.Tensor, sliding: torch.Tensor | None = None) -> Any:
    """Return a 4-D mask as the family's forward pass takes it: by layer type, or one mask for all layers.

    Args:
        config: of the language model.
        mask: bool, True where a query sees a key.
        sliding: instead of ``mask`` in layers with a sliding window.
    """
    sliding = mask if sliding is None else sliding
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: sliding if kind == "sliding_attention" else mask for kind in kinds}
    return mask if getattr(config, "sliding_window", None) is None else sliding


def generating_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a family's own causal language model with :class:`PrefillMask` mixed in."""
    return type(model_class.__name__, (PrefillMask, model_class), {})


def assign_masks(layers: Iterable[nn.Module], policy: Policy) -> None:
    """Tell each decoder layer's attention which of the masks of a prompt is its own."""
    names = [part.name for part in policy.parts]
    for index, layer in enumerate(layers):
        setattr(layer.self_attn, MASK_INDEX, names.index(policy.at(index).name))


class GatedCache(GatedKeys, DynamicCache):  # type: ignore[misc]
    """The cache of ``generate`` for a model with gates."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of different lengths, left-padded to P tokens."""

    embeds: torch.Tensor
    """[B, P, D]; zeros in padding."""
    attention_mask: torch.Tensor
    """int64[B, P]; 0 in padding."""
    position_ids: torch.Tensor
    """int64[B, P]; 0 in padding."""
    prefill_mask: torch.Tensor
    """bool[B, parts of the policy, P, P]; a padding token sees itself, so no softmax is empty."""
    visual: torch.Tensor
    """bool[B, P]: which tokens are media."""

    def without_reads(self, ignored: torch.Tensor) -> PromptBatch:
        """Return the batch with image tokens ``ignored``, bool[B, P], that text does not read, now or later.

        They stay visible to media. New tokens are text, so the 2-D mask, which holds for them alone, hides the tokens.
        """
        text = self.attention_mask.bool() & ~self.visual
        attention_mask = self.attention_mask * ~ignored
        return replace(self, attention_mask=attention_mask, prefill_mask=cut(self.prefill_mask, text, ignored))

    @classmethod
    def of(cls, policy: Policy, prompts: Sequence[tuple[Sidecars, torch.Tensor]]) -> PromptBatch:
        """Build the batch from each prompt's sidecars (length T) and embeddings [T, D]."""
        longest = max(len(sidecars) for sidecars, _ in prompts)
        embeds, real, positions, masks, visual = [], [], [], [], []
        for sidecars, embeds_TD in prompts:
            gap, device = longest - len(sidecars), embeds_TD.device
            embeds.append(F.pad(embeds_TD, (0, 0, gap, 0)))
            real.append(F.pad(torch.ones(len(sidecars), dtype=torch.long, device=device), (gap, 0)))
            positions.append(F.pad(position_ids(sidecars, policy.grid).to(device), (gap, 0)))
            allowed = torch.stack([dense_mask(part, sidecars).to(device) for part in policy.parts])
            masks.append(F.pad(allowed, (gap, 0, gap, 0)) | torch.eye(longest, dtype=torch.bool, device=device))
            visual.append(F.pad((sidecars.modality != TEXT).to(device), (gap, 0)))
        return cls(*map(torch.stack, (embeds, real, positions, masks, visual)))
