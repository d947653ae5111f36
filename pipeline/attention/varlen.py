"""One thin adapter over torch's variable-length flash attention, whose signature moved between releases."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention import varlen

from pipeline.attention.runs import Part

MAX_HEAD_SIZE = 256
_PARAMETERS = frozenset(inspect.signature(varlen.varlen_attn).parameters)


def attend_varlen(
    q_THD: torch.Tensor, k_KHkD: torch.Tensor, v_KHkD: torch.Tensor, part: Part, *, scaling: float
) -> torch.Tensor:
    """Attend the T queries of a part to its K gathered keys in one flash call; out[T, H, D].

    Needs fp16 or bf16 on CUDA and a head size of at most ``MAX_HEAD_SIZE``.
    """
    # Rows past the last offset come back as garbage gradients, so the runs must cover every row.
    assert part.q_tokens == q_THD.shape[0] and part.k_tokens == k_KHkD.shape[0], "a part does not cover its rows"
    options: dict[str, Any] = {}
    if "window_size" in _PARAMETERS:  # torch 2.11 and later
        options["window_size"] = (-1, 0) if part.causal else (-1, -1)
    else:
        options["is_causal"] = part.causal
    if "enable_gqa" in _PARAMETERS:
        options["enable_gqa"] = q_THD.shape[1] != k_KHkD.shape[1]
    if "scale" in _PARAMETERS:
        options["scale"] = scaling
    else:
        q_THD = q_THD * (scaling * q_THD.shape[-1] ** 0.5)
    out = varlen.varlen_attn(q_THD, k_KHkD, v_KHkD, part.cu_q, part.cu_k, part.max_q, part.max_k, **options)
    assert isinstance(out, torch.Tensor)
    return out
