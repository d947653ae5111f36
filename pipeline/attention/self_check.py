"""A check of flash attention on a GPU, once per process: a wrong mask must not train or serve a model silently."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from data_prep.common.errors import UserError
from pipeline.attention.runs import VarlenBatch
from pipeline.attention.varlen import attend_varlen

Q_LENGTHS, K_LENGTHS = (2, 3), (5, 7)
HEADS, HEAD_SIZE = 2, 16
TOLERANCE = 0.05
"""Above the rounding of bf16 at values near 1; a misaligned mask is off by about 1."""


@cache
def check_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Check the kernel of this device and dtype at its first use. Raises UserError as :func:`check_alignment` does."""
    check_alignment(lambda q, k, v, batch: attend_varlen(q, k, v, batch, scaling=HEAD_SIZE**-0.5), device, dtype)


def check_alignment(
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenBatch], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Compare a variable-length kernel with a dense causal mask, aligned bottom-right, on two runs with more keys.

    Args:
        kernel: q[T, H, D], k and v[K, H, D], batch -> out[T, H, D], scaled by ``D ** -0.5``.
        device: where it runs.
        dtype: dtype of its inputs.

    Raises:
        UserError: the results differ. A kernel that aligns causal masks top-left would hide the question from images.
    """
    batch = VarlenBatch.build(True, np.array(Q_LENGTHS), np.array(K_LENGTHS))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, HEADS, HEAD_SIZE, generator=generator).to(dtype)
        for rows in (batch.q_tokens, batch.k_tokens, batch.k_tokens)
    )
    moved = batch.map(lambda tensor: tensor.to(device))
    found = kernel(q.to(device), k.to(device), v.to(device), moved).float().cpu()
    worst = float((found - _dense(q.float(), k.float(), v.float())).abs().max())
    if not worst <= TOLERANCE:  # also refuses nan
        raise UserError(
            f"variable-length attention of torch {torch.__version__} on {device} gives wrong results (off by "
            f"{worst:.2g}): it may align causal masks top-left; use the torch version of constraints.txt"
        )


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    outs = []
    runs = torch.split(q, [*Q_LENGTHS]), torch.split(k, [*K_LENGTHS]), torch.split(v, [*K_LENGTHS])
    for q_run, k_run, v_run in zip(*runs, strict=True):
        logits = torch.einsum("qhd,khd->hqk", q_run, k_run) * HEAD_SIZE**-0.5
        seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(len(k_run) - len(q_run))
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v_run))
    return torch.cat(outs)
