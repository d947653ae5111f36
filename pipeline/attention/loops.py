"""Attention with log-sum-exp on the CPU, one call per run; same interface as ``pipeline.attention.varlen``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.attention.runs import AttentionState, Gradients, VarlenBatch

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward_with_lse(
    q_THD: torch.Tensor, k_KHkD: torch.Tensor, v_KHkD: torch.Tensor, batch: VarlenBatch, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out[T, H, D] and the log-sum-exp of the logits, fp32[H, T]; causal runs must be square."""
    groups = q_THD.shape[1] // k_KHkD.shape[1]
    runs = [
        _FORWARD(_heads(q), _heads(k, groups), _heads(v, groups), 0.0, batch.causal, scale=scaling)
        for q, k, v in _runs(batch, (q_THD,), (k_KHkD, v_KHkD))
    ]
    out_THD = torch.cat([out[0].transpose(0, 1) for out, _ in runs])
    return out_THD, torch.cat([lse[0] for _, lse in runs], dim=1)


def backward_with_lse(
    gradient_THD: torch.Tensor, state: AttentionState, batch: VarlenBatch, scaling: float
) -> Gradients:
    """Return the gradients of q, k and v for this batch's share of a softmax whose output and log-sum-exp are given."""
    q_THD, k_KHkD, v_KHkD, out_THD, lse_HT = state
    groups = q_THD.shape[1] // k_KHkD.shape[1]
    collected: list[tuple[torch.Tensor, ...]] = []
    lse_TH = lse_HT.T
    for gradient, q, out, lse, k, v in _runs(batch, (gradient_THD, q_THD, out_THD, lse_TH), (k_KHkD, v_KHkD)):
        dq, dk, dv = _BACKWARD(
            _heads(gradient),
            _heads(q),
            _heads(k, groups),
            _heads(v, groups),
            _heads(out),
            lse.T.contiguous()[None],
            0.0,
            batch.causal,
            scale=scaling,
        )
        grouped = (x[0].unflatten(0, (-1, groups)).sum(1) for x in (dk, dv))
        collected.append(tuple(x.transpose(0, 1) for x in (dq[0], *grouped)))
    dq, dk, dv = (torch.cat(gradients) for gradients in zip(*collected, strict=True))
    return dq, dk, dv


def _runs(
    batch: VarlenBatch, per_query: tuple[torch.Tensor, ...], per_key: tuple[torch.Tensor, ...]
) -> Iterator[tuple[torch.Tensor, ...]]:
    assert not batch.causal or batch.q_lengths == batch.k_lengths, "the CPU kernel's causal mask is for square runs"
    columns = [torch.split(x, list(batch.q_lengths)) for x in per_query]
    columns += [torch.split(x, list(batch.k_lengths)) for x in per_key]
    return zip(*columns, strict=True)


def _heads(x_THD: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    """[T, H, D] -> [1, H * repeats, T, D]."""
    return x_THD.transpose(0, 1).repeat_interleave(repeats, dim=0)[None]
