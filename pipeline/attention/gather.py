"""A row gather whose backward is a deterministic gather-sum instead of atomic additions."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.attention.runs import Gather


class _GatherRows(torch.autograd.Function):
    """``y = x[rows]``; the backward sums the copies of each row of x in a fixed order (bf16 accumulates in fp32)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: Gather) -> torch.Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, gather = gradients[0], ctx.gather
        return scatter_sum(gradient, gather), None


def gather_rows(x: torch.Tensor, gather: Gather | None) -> torch.Tensor:
    """Return ``x[gather.rows]`` along the first dimension ([T, ...] -> [K, ...]); None is the identity."""
    if gather is None:
        return x
    gathered: torch.Tensor = _GatherRows.apply(x, gather)  # type: ignore[no-untyped-call]
    return gathered


def scatter_sum(y: torch.Tensor, gather: Gather) -> torch.Tensor:
    """Return, for each row of x, the sum of its copies in y in a fixed order: [K, ...] -> [T, ...]."""
    return _sum_rows(y.reshape(y.shape[0], -1), gather.bag, gather.offsets).view(-1, *y.shape[1:])


def _sum_rows(source_KW: torch.Tensor, bag: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if source_KW.is_cuda and source_KW.dtype != torch.float64 and _has_triton():
        from pipeline.attention.gather_triton import sum_rows

        return sum_rows(source_KW.contiguous(), bag, offsets)  # the gradient of a sum is an expanded scalar
    # An embedding bag is torch's own gather-sum: no atomics, and bf16 accumulates in fp32.
    return F.embedding_bag(bag, source_KW, offsets, mode="sum", include_last_offset=True)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
