"""A thin adapter to torch's variable-length flash attention, whose signature changes between releases.

Queries are [T, H, D], keys and values [K, H_kv, D], fp16 or bf16 on CUDA; D is a multiple of 8, at most
``MAX_HEAD_SIZE``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention import varlen

from pipeline.attention.runs import AttentionState, Gradients, VarlenBatch

MAX_HEAD_SIZE = 256
_PARAMETERS = frozenset(inspect.signature(varlen.varlen_attn).parameters)


def attend_varlen(
    q_THD: torch.Tensor, k_KHkD: torch.Tensor, v_KHkD: torch.Tensor, batch: VarlenBatch, *, scaling: float
) -> torch.Tensor:
    """Attend the T queries of a batch to its K gathered keys in one flash call; out[T, H, D], differentiable."""
    _check_cover(q_THD, k_KHkD, batch)
    window = (-1, 0) if batch.causal else (-1, -1)
    offered = {"window_size": window, "is_causal": batch.causal, "enable_gqa": q_THD.shape[1] != k_KHkD.shape[1]}
    options: dict[str, Any] = {name: value for name, value in offered.items() if name in _PARAMETERS}
    if "scale" in _PARAMETERS:
        options["scale"] = scaling
    else:
        q_THD = q_THD * (scaling * q_THD.shape[-1] ** 0.5)
    out = varlen.varlen_attn(q_THD, k_KHkD, v_KHkD, batch.cu_q, batch.cu_k, batch.max_q, batch.max_k, **options)
    assert isinstance(out, torch.Tensor)
    return out


def forward_with_lse(
    q_THD: torch.Tensor, k_KHkD: torch.Tensor, v_KHkD: torch.Tensor, batch: VarlenBatch, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out[T, H, D] and the log-sum-exp of the logits, fp32[H, T]; not differentiable."""
    _check_cover(q_THD, k_KHkD, batch)
    given = {"query": q_THD, "key": k_KHkD, "value": v_KHkD, **_options(batch, scaling)}
    given["enable_gqa"] = q_THD.shape[1] != k_KHkD.shape[1]
    out, lse, _ = _call(torch.ops.torch_attn._varlen_attn.default, given)
    return out, lse


def backward_with_lse(
    gradient_THD: torch.Tensor, state: AttentionState, batch: VarlenBatch, scaling: float
) -> Gradients:
    """Return the gradients of q, k and v for this batch's share of a softmax whose output and log-sum-exp are given."""
    q_THD, k_KHkD, v_KHkD, out_THD, lse_HT = state
    _check_cover(q_THD, k_KHkD, batch)
    # Without dropout the random state is never read, but the operator requires one.
    random_state = torch.zeros(2, dtype=torch.uint64, device=q_THD.device)
    given = {"query": q_THD, "key": k_KHkD, "value": v_KHkD, **_options(batch, scaling), "rng_state": random_state}
    given |= {"grad_out": gradient_THD.contiguous(), "out": out_THD, "lse": lse_HT.contiguous()}
    dq, dk, dv = _call(torch.ops.torch_attn._varlen_attn_backward.default, given)
    return dq, dk, dv


def _check_cover(q_THD: torch.Tensor, k_KHkD: torch.Tensor, batch: VarlenBatch) -> None:
    # Rows past the last offset would get garbage gradients, so the runs must cover every row.
    assert batch.q_tokens == q_THD.shape[0] and batch.k_tokens == k_KHkD.shape[0], "the batch must cover all rows"


def _options(batch: VarlenBatch, scaling: float) -> dict[str, Any]:
    bounds = {"cu_seq_q": batch.cu_q, "cu_seq_k": batch.cu_k, "max_q": batch.max_q, "max_k": batch.max_k}
    window = [-1, 0] if batch.causal else [-1, -1]
    return {**bounds, "is_causal": batch.causal, "scale": scaling, "window_size": window}


def _call(operator: Any, given: dict[str, Any]) -> Any:
    known = {argument.name for argument in operator._schema.arguments}
    return operator(**{name: value for name, value in given.items() if name in known})
