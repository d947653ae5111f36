"""Attention with one call of torch's fused kernel per run: any device, any dtype; used on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from pipeline.attention.runs import VarlenBatch

QUERY_BLOCK = 256
"""Queries of a long run are processed in blocks: the mask of a block stays O(T), and later keys are skipped."""


def attend_sdpa_runs(
    q_BHTD: torch.Tensor,
    k_BHkKD: torch.Tensor,
    v_BHkKD: torch.Tensor,
    batch: VarlenBatch,
    *,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attend the T queries of a batch to its K gathered keys, run by run; out[1, H, T, D]."""
    lengths = [list(batch.q_lengths), list(batch.k_lengths), list(batch.k_lengths)]
    # Split, never slice: the backward of every slice would fill a whole row with zeros.
    q_runs, k_runs, v_runs = (
        torch.split(x, sizes, dim=2) for x, sizes in zip((q_BHTD, k_BHkKD, v_BHkKD), lengths, strict=True)
    )
    outs = [
        out
        for q, k, v in zip(q_runs, k_runs, v_runs, strict=True)
        for out in _run(q, k, v, batch.causal, scaling, softcap)
    ]
    return torch.cat(outs, dim=2)


def sdpa(
    q_BHTD: torch.Tensor,
    k_BHkKD: torch.Tensor,
    v_BHkKD: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads; torch's fused kernel unless logits are soft-capped.

    Args:
        q_BHTD: queries [B, H, T, D].
        k_BHkKD: keys [B, H_kv, K, D]; H_kv divides H.
        v_BHkKD: values [B, H_kv, K, D].
        mask: bool, broadcastable to [B, H, T, K], True where visible; None: all visible.
        scaling: factor of the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        is_causal: causal, aligned top-left; only without ``mask``.

    Returns:
        out [B, H, T, D].
    """
    repeats = q_BHTD.shape[1] // k_BHkKD.shape[1]
    masked_on_cuda = mask is not None and q_BHTD.is_cuda  # CUDA has no fused kernel for grouped heads with a mask
    if softcap is None and not masked_on_cuda:
        return F.scaled_dot_product_attention(
            q_BHTD, k_BHkKD, v_BHkKD, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=repeats > 1
        )
    k_BHKD, v_BHKD = (x.repeat_interleave(repeats, dim=1) for x in (k_BHkKD, v_BHkKD))
    if softcap is None:
        return F.scaled_dot_product_attention(q_BHTD, k_BHKD, v_BHKD, attn_mask=mask, scale=scaling)
    logits = softcap * torch.tanh(q_BHTD @ k_BHKD.transpose(2, 3) * (scaling / softcap))
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)  # finite where a padding row sees nothing
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights.to(v_BHKD.dtype) @ v_BHKD


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scaling: float, softcap: float | None
) -> Iterator[torch.Tensor]:
    queries, keys = q.shape[2], k.shape[2]
    if not causal or (queries == keys <= QUERY_BLOCK):
        yield sdpa(q, k, v, None, scaling=scaling, softcap=softcap, is_causal=causal)
        return
    for first in range(0, queries, QUERY_BLOCK):
        block = q.narrow(2, first, min(QUERY_BLOCK, queries - first))
        before = keys - queries + first  # keys ahead of the block's own tokens, visible to all its queries
        seen = before + block.shape[2]
        mask = torch.ones(block.shape[2], seen, dtype=torch.bool, device=q.device).tril(before)
        yield sdpa(block, k.narrow(2, 0, seen), v.narrow(2, 0, seen), mask, scaling=scaling, softcap=softcap)
