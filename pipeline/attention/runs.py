"""Run-split: the mask of a packed row as a list of ordinary causal or bidirectional attention problems.

A segment is split into runs of tokens that see the same keys up to causality. The queries of a run [x, y) in a segment
that starts at a attend to the keys ``[a..x) ++ unlocked later tokens ++ [x..y)``. In that order the run is plain
causal, aligned bottom-right, or bidirectional where its tokens see each other both ways. Together the runs compute
exactly the allowed pairs; nothing here is larger than the gathered keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch

from pipeline.masks.policies import Policy
from pipeline.masks.sidecars import BoolArray, IntArray, TokenTable, run_first, run_starts
from pipeline.masks.spans import TokenSpans, expand, token_spans

PADDING_CHUNK = 64
"""Padding is attended in causal chunks of at most this many tokens: every row is covered at little cost."""


@dataclass(frozen=True)
class VarlenBatch:
    """Consecutive runs of one kind: one variable-length attention call."""

    causal: bool
    """Causal and aligned bottom-right; else bidirectional."""
    q_lengths: tuple[int, ...]
    """Queries of each run."""
    k_lengths: tuple[int, ...]
    """Keys of each run."""
    cu_q: torch.Tensor
    """Start of each run's queries, then the total; int32[runs + 1]."""
    cu_k: torch.Tensor
    """Start of each run's keys among the batch's gathered keys, then the total; int32[runs + 1]."""

    @classmethod
    def build(cls, causal: bool, q_lengths: IntArray, k_lengths: IntArray) -> VarlenBatch:
        """Build a batch of runs with these lengths, int64[runs] each."""
        cu_q, cu_k = (torch.from_numpy(np.append(0, np.cumsum(x)).astype(np.int32)) for x in (q_lengths, k_lengths))
        return cls(causal, tuple(q_lengths.tolist()), tuple(k_lengths.tolist()), cu_q, cu_k)

    @cached_property
    def q_tokens(self) -> int:
        """Queries of the batch."""
        return sum(self.q_lengths)

    @cached_property
    def k_tokens(self) -> int:
        """Gathered keys of the batch."""
        return sum(self.k_lengths)

    @cached_property
    def max_q(self) -> int:
        """Queries of the longest run."""
        return max(self.q_lengths, default=0)

    @cached_property
    def max_k(self) -> int:
        """Keys of the run with the most keys."""
        return max(self.k_lengths, default=0)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> VarlenBatch:
        """Return the batch with ``change`` applied to its tensors, such as a copy to a device."""
        return VarlenBatch(self.causal, self.q_lengths, self.k_lengths, change(self.cu_q), change(self.cu_k))


class AttentionState(NamedTuple):
    """Tensors that the backward pass of an attention call needs from its forward pass."""

    q_THD: torch.Tensor
    k_KHkD: torch.Tensor
    v_KHkD: torch.Tensor
    out_THD: torch.Tensor
    lse_HT: torch.Tensor
    """Log-sum-exp of the logits, fp32."""


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of queries, keys and values."""


@dataclass(frozen=True)
class Gather:
    """``y = x[rows]``, plus the tables of its deterministic backward: for each row of x, its copies in y."""

    rows: torch.Tensor
    """int64[K]."""
    bag: torch.Tensor
    """Rows of y, grouped by the row of x they copy; int64[K]."""
    offsets: torch.Tensor
    """Start of each group in ``bag``, then the total; int64[T + 1]."""

    @classmethod
    def build(cls, index: IntArray, rows: int) -> Gather | None:
        """Build the gather of ``index`` (int64[K]) from ``rows`` rows; None for the identity."""
        return None if len(index) == rows and np.array_equal(index, np.arange(rows)) else cls.of(index, rows)

    @classmethod
    def of(cls, index: IntArray, rows: int) -> Gather:
        """Build the gather of ``index`` (int64[K]) from ``rows`` rows, even if it is the identity."""
        ends = np.cumsum(np.bincount(index, minlength=rows))
        arrays = index, np.argsort(index, kind="stable"), np.append(0, ends)
        return cls(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Gather:
        """Return the gather with ``change`` applied to its tensors."""
        return Gather(*map(change, (self.rows, self.bag, self.offsets)))


@dataclass(frozen=True)
class RunSplit:
    """A row's attention: gather queries, keys and values, make one call per batch, restore the queries' order."""

    batches: tuple[VarlenBatch, ...]
    """Causal runs, then bidirectional runs; a kind without runs is omitted."""
    queries: Gather | None
    """Queries in the order of the batches; None when that is the row's own order."""
    outputs: Gather | None
    """The inverse of ``queries``: from the order of the batches back to the row's."""
    keys: Gather | None
    """Keys of all batches, concatenated; None when every segment is one causal run."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RunSplit:
        """Return the tables with ``change`` applied to each tensor."""
        batches = tuple(batch.map(change) for batch in self.batches)
        gathers = (None if gather is None else gather.map(change) for gather in (self.queries, self.outputs, self.keys))
        return RunSplit(batches, *gathers)

    def to(self, device: torch.device | str) -> RunSplit:
        """Return the tables on ``device``; the copies are asynchronous from pinned memory."""
        return self.map(mover(device))


def mover(device: torch.device | str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the copy of a tensor to ``device``; it is asynchronous from pinned memory."""
    return partial(torch.Tensor.to, device=device, non_blocking=True)


def split_runs(runs: QueryRuns, order: IntArray | None, tokens: int) -> RunSplit:
    """Convert a row's runs into attention calls; O(T + gathered keys) time and memory.

    Args:
        runs: of the row, with its tokens in the policy's causal order.
        order: the policy's causal order, int64[T]; None for the row's own order.
        tokens: T.
    """
    runs = runs.take(np.argsort(runs.bidirectional, kind="stable"))
    q_index, k_index = expand(runs.start, runs.end), expand(runs.key_start, runs.key_end)
    if order is not None:
        q_index, k_index = order[q_index], order[k_index]
    q_lengths, k_lengths, bidirectional = runs.end - runs.start, runs.key_counts, runs.bidirectional
    batches = [
        VarlenBatch.build(not both_ways, q_lengths[bidirectional == both_ways], k_lengths[bidirectional == both_ways])
        for both_ways in (False, True)
    ]
    gathers = (Gather.build(index, tokens) for index in (q_index, np.argsort(q_index), k_index))
    return RunSplit(tuple(batch for batch in batches if batch.q_lengths), *gathers)


@dataclass(frozen=True)
class QueryRuns:
    """Query runs [start, end), each with its keys as ranges of tokens in order; int64[runs] unless stated."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """Start of the run's segment."""
    bidirectional: BoolArray
    """Tokens of the run see each other both ways; bool[runs]."""
    key_run: IntArray
    """Run of each range of keys, ascending; this and the bounds of the ranges are int64[ranges]."""
    key_start: IntArray
    key_end: IntArray

    @property
    def key_counts(self) -> IntArray:
        """Keys of each run, int64[runs]."""
        counts = np.bincount(self.key_run, weights=self.key_end - self.key_start, minlength=len(self.start))
        return counts.astype(np.int64)

    def take(self, order: IntArray) -> QueryRuns:
        """Return the runs permuted by ``order``, int64[runs]."""
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        spans = np.argsort(rank[self.key_run], kind="stable")
        return QueryRuns(
            start=self.start[order],
            end=self.end[order],
            first_key=self.first_key[order],
            bidirectional=self.bidirectional[order],
            key_run=rank[self.key_run][spans],
            key_start=self.key_start[spans],
            key_end=self.key_end[spans],
        )


def query_runs(policy: Policy, table: TokenTable) -> QueryRuns:
    """Split a row, its tokens in the policy's causal order, into ascending runs."""
    index = np.arange(len(table))
    chunk = (index - run_first(run_starts(table.segment))) % PADDING_CHUNK == 0
    segment_starts = run_starts(table.segment) | ((table.segment == 0) & chunk)
    return _merge(token_spans(policy, table, segment_starts))


def _merge(spans: TokenSpans) -> QueryRuns:
    """Merge neighbouring spans that see the same keys up to causality into runs."""
    head = np.flatnonzero(~_joins_previous(spans))
    tail = np.append(head[1:], len(spans)) - 1
    start, end = spans.start[head], spans.end[tail]
    run_of = np.full(len(spans), -1)
    run_of[tail] = np.arange(len(tail))
    kept = run_of[spans.left] >= 0
    later = spans.right[kept]
    own = np.arange(len(head))
    key_run = np.concatenate([own, run_of[spans.left[kept]], own])
    order = np.argsort(key_run, kind="stable")  # keys before the run, unlocked keys after it, the run itself
    first_key, bidirectional = spans.first_key[head], spans.bidirectional[tail]
    key_start = np.concatenate([first_key, spans.start[later], start])
    key_end = np.concatenate([start, spans.end[later], end])
    return QueryRuns(start, end, first_key, bidirectional, key_run[order], key_start[order], key_end[order])


def _joins_previous(spans: TokenSpans) -> BoolArray:
    """Mark spans that see the same keys as the span before them, up to causality within the two."""
    own = np.arange(len(spans))
    previous = np.maximum(own - 1, 0)
    count = np.bincount(spans.left, minlength=len(spans))
    offset = np.cumsum(count) - count
    # The previous span's list ends where this one begins, so its tail lies one length of this list earlier.
    tail = np.maximum(np.arange(len(spans.right)) - count[spans.left], 0)
    differs = spans.right[tail] != spans.right
    same_later = np.bincount(spans.left, weights=differs, minlength=len(spans)) == 0
    more = count[previous] - count  # a bidirectional span's list names its neighbour first, a causal one's does not
    names_me = np.append(spans.right, -1)[offset[previous]] == own
    alike = np.where(spans.bidirectional, (more == 1) & names_me, more == 0)
    same_kind = spans.bidirectional == spans.bidirectional[previous]
    joins: BoolArray = alike & same_later & same_kind & (spans.first_key == spans.first_key[previous])
    joins[:1] = False
    return joins
