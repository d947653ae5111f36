"""The plug into Hugging Face decoders: attention implementation ``mma`` takes a plan in place of the mask.

A decoder layer passes ``attention_mask=`` unchanged to its attention, so a plan given there arrives here::

    register()
    model.set_attn_implementation("mma")
    hidden = layer(hidden, attention_mask=plan, position_ids=..., position_embeddings=...)

Any other mask (None, or the boolean mask of ``generate``) goes to transformers' own sdpa, so decoding with a KV cache
works on the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data_prep.common.errors import UserError
from pipeline.attention.backends import attend
from pipeline.attention.gate import gate_of, gated
from pipeline.attention.plan import AttentionPlan
from pipeline.attention.sdpa_runs import sdpa

Watch: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None, float, float | None], None]
"""``watch(layer, queries, keys, mask, scaling, softcap)``: queries [B, H, Q, D], keys [B, H_kv, K, D], mask
bool[B, 1, Q, K]."""

NAME = "mma"
MASK_INDEX = "mma_mask_index"
"""Attribute of a layer's attention: which of the masks [B, N, Q, K] of a prompt is its own."""

WATCH: ContextVar[Watch | None] = ContextVar("mma_watch", default=None)
"""Called before each attention under a mask, while generating."""


def register() -> str:
    """Register ``attn_implementation="mma"`` with transformers; return the name. Idempotent."""
    AttentionInterface.register(NAME, mma_attention)
    # Without a mask function of the same name, generate() would silently drop padding masks.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def mma_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionPlan | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend through transformers' interface: q[B, H, T, D], k and v[B, H_kv, T, D] -> (out[B, T, H, D], None).

    With a plan, B is 1, and the plan covers the T tokens. A layer with a gate adds its bias
    (`pipeline.attention.gate`).

    Raises:
        UserError: a plan is combined with attention dropout, or with a sliding window shorter than its longest segment.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap, **kwargs}
    options["sliding_window"] = sliding_window

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _attend(module, q, k, v, attention_mask, **options)

    if (gate := gate_of(module)) is None:
        return call(query, key, value), None
    visual = attention_mask.visual[None] if isinstance(attention_mask, AttentionPlan) else None
    return gated(call, gate, (query, key, value), visual, scaling), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionPlan | torch.Tensor | None,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend under a plan or a mask; out[B, T, H, D]."""
    if not isinstance(attention_mask, AttentionPlan):
        attention_mask = _own_mask(module, attention_mask)
        if (watch := WATCH.get()) is not None:
            watch(int(module.layer_idx), query, key, attention_mask, scaling, softcap)  # type: ignore[arg-type]
        if softcap is not None:
            return _capped(query, key, value, attention_mask, scaling, softcap)
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        out: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return out
    plan = attention_mask
    if dropout:
        raise UserError(
            f"attention dropout {dropout} is not supported: set attention_dropout to 0 in the model's config"
        )
    if sliding_window is not None and sliding_window < plan.longest_segment:
        raise UserError(
            f"a layer's sliding window of {sliding_window} tokens is shorter than a packed sample of "
            f"{plan.longest_segment}: pack shorter samples, or use a model with full attention"
        )
    return attend(query, key, value, plan, scaling=scaling, softcap=softcap).transpose(1, 2)


def _own_mask(module: torch.nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the layer's own mask, [B, 1, Q, K], where a prompt has one per policy: [B, N, Q, K]."""
    index: int | None = getattr(module, MASK_INDEX, None)
    return mask if mask is None or index is None or mask.shape[1] == 1 else mask[:, index : index + 1]


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Soft-capped attention of a decoding step, which transformers' sdpa does not support; out[B, T, H, D]."""
    is_causal = mask is None and q.shape[2] > 1
    return sdpa(q, k, v, mask, scaling=scaling, softcap=softcap, is_causal=is_causal).transpose(1, 2)
