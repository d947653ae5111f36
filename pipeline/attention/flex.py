"""FlexAttention with a block mask computed from run bounds instead of evaluating the mask on every pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from data_prep.common.errors import UserError
from pipeline.attention.runs import QueryRuns, query_runs
from pipeline.masks.policies import Policy
from pipeline.masks.sidecars import BoolArray, IntArray, Sidecars, SpanColumns, TokenTable
from pipeline.masks.spans import expand

BLOCK = 128


def attend_flex(
    q_BHTD: torch.Tensor,
    k_BHkTD: torch.Tensor,
    v_BHkTD: torch.Tensor,
    mask: BlockMask,
    *,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attend in one fused kernel, compiled on CUDA once per shape; out[1, H, T, D]. Arguments as in ``attend``."""
    tokens = q_BHTD.shape[2]
    pad = -tokens % BLOCK
    q, k, v = (F.pad(x, (0, 0, 0, pad)) if pad else x for x in (q_BHTD, k_BHkTD, v_BHkTD))
    out: torch.Tensor = _kernel(q.device.type)(
        q,
        k,
        v,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.narrow(2, 0, tokens)


def build_block_mask(policy: Policy, sidecars: Sidecars, device: torch.device) -> BlockMask:
    """Return the block mask of a row of T tokens, padded to full blocks; O(T + (T / 128)^2) time and memory.

    Raises UserError for a policy that reorders tokens (``cca``).
    """
    if policy.grid is not None:
        raise UserError(
            f"attention backend 'flex' cannot reorder tokens as policy '{policy.name}' does: use 'runsplit'"
        )
    table = policy.table(sidecars)
    side = -(-len(table) // BLOCK)
    pairs, inside = _pairs_per_block(query_runs(policy, table), side)
    if pad := side * BLOCK - len(table):
        inside[-1, -1] = True  # rows past the end see themselves, so no softmax is empty
    whole = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_block_lists(inside & ~whole, device),
        *_block_lists(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(policy, table, pad, device),
        seq_lengths=(side * BLOCK, side * BLOCK),
    )


def _pairs_per_block(runs: QueryRuns, side: int) -> tuple[IntArray, BoolArray]:
    """Count allowed pairs per block of queries x keys, except in diagonal triangles, and mark blocks with any pair."""
    run = runs.key_run
    own = (runs.key_start == runs.start[run]) & (runs.key_end == runs.end[run])
    first_q, last_q = runs.start[run] // BLOCK, (runs.end[run] - 1) // BLOCK
    first_k, last_k = runs.key_start // BLOCK, (runs.key_end - 1) // BLOCK
    empty = runs.key_end == runs.key_start
    wide = np.where(empty, 0, last_k - first_k + 1)
    counts = (last_q - first_q + 1) * wide
    span = np.repeat(np.arange(len(run)), counts)
    place = expand(np.zeros_like(counts), counts)
    row, column = first_q[span] + place // wide[span], first_k[span] + place % wide[span]
    triangle = own[span] & ~runs.bidirectional[run][span]
    keep = ~triangle | (column <= row)
    area = _overlap(row, runs.start[run][span], runs.end[run][span]) * _overlap(
        column, runs.key_start[span], runs.key_end[span]
    )
    area = np.where(triangle & (column == row), 0, area)
    cell = (row * side + column)[keep]
    pairs = np.bincount(cell, weights=area[keep], minlength=side * side).astype(np.int64)
    inside = np.bincount(cell, minlength=side * side) > 0
    return pairs.reshape(side, side), inside.reshape(side, side)


def _overlap(block: IntArray, start: IntArray, end: IntArray) -> IntArray:
    shared: IntArray = np.minimum((block + 1) * BLOCK, end) - np.maximum(block * BLOCK, start)
    return shared


def _block_lists(marked: BoolArray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per block row, the number of marked blocks and all columns with the marked ones first; int32."""
    counts = torch.from_numpy(marked.sum(axis=1).astype(np.int32))
    columns = torch.from_numpy(np.argsort(~marked, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), columns[None, None].to(device)


def _mask_mod(policy: Policy, table: TokenTable, pad: int, device: torch.device) -> Callable[..., torch.Tensor]:
    def column(values: IntArray, fill: int) -> torch.Tensor:
        return torch.from_numpy(np.append(values, np.full(pad, fill))).to(device)

    limit = column(table.segment_end if policy.leaks else table.commit, -1)
    tokens = SpanColumns(*(column(values, 0) for values in table.span_columns))  # type: ignore[arg-type]
    unlock: Any = policy.unlock  # predicates only compare and combine, so they also work on tensors

    def allowed(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        i, j = tokens.at(q), tokens.at(k)
        visible: torch.Tensor = k <= q
        if unlock is not None:
            visible = visible | (unlock(i, j) & (k <= limit[q]))
        same: Any = (i.segment == j.segment) & (i.segment > 0)
        result: torch.Tensor = (visible & same) | (q == k)
        return result

    return allowed


def _soft_cap(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@lru_cache(maxsize=2)
def _kernel(device: str) -> Callable[..., Any]:
    # Static shapes on purpose: dynamic shapes gave NaN with masks that depend on the batch.
    return (
        torch.compile(flex_attention, dynamic=False) if device == "cuda" else cast("Callable[..., Any]", flex_attention)
    )
