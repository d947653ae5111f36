"""Run-split: the mask of a packed row as a list of ordinary causal (or full) attention problems.

A segment is cut into runs of tokens that see the same set of keys up to causality. Queries of a run [x, y) of the
segment that starts at a attend to the keys ``[a..x) ++ unlocked later tokens ++ [x..y)``. In that order the run is
plain causal, aligned bottom-right, or full where its tokens see each other both ways. All runs together compute
exactly the allowed pairs; nothing here is larger than the gathered keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.masks.policies import Policy
from pipeline.masks.sidecars import BoolArray, IntArray, Sidecars, TokenTable, run_first, run_starts

PADDING_CHUNK = 64
"""Padding is attended in causal chunks of at most this many tokens, so that kernels cover every row cheaply."""


@dataclass(frozen=True)
class Part:
    """Runs of one kind, run after run: one variable-length attention call."""

    causal: bool
    """Causal aligned bottom-right, or full."""
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: torch.Tensor
    """Where each run's queries begin, and the total; int32[runs + 1]."""
    cu_k: torch.Tensor
    """Where each run's keys begin in the gathered keys of the part, and the total; int32[runs + 1]."""

    @classmethod
    def build(cls, causal: bool, q_lengths: IntArray, k_lengths: IntArray) -> Part:
        """Make a part of runs with these lengths."""
        cu_q, cu_k = (torch.from_numpy(np.append(0, np.cumsum(x)).astype(np.int32)) for x in (q_lengths, k_lengths))
        return cls(causal, tuple(q_lengths.tolist()), tuple(k_lengths.tolist()), cu_q, cu_k)

    @cached_property
    def q_tokens(self) -> int:
        """Queries of the part."""
        return sum(self.q_lengths)

    @cached_property
    def k_tokens(self) -> int:
        """Gathered keys of the part."""
        return sum(self.k_lengths)

    @cached_property
    def max_q(self) -> int:
        """Queries of the longest run."""
        return max(self.q_lengths, default=0)

    @cached_property
    def max_k(self) -> int:
        """Keys of the run with most keys."""
        return max(self.k_lengths, default=0)

    def to(self, device: torch.device | str) -> Part:
        """Return the part with its tensors on ``device``."""
        return Part(self.causal, self.q_lengths, self.k_lengths, _move(self.cu_q, device), _move(self.cu_k, device))


@dataclass(frozen=True)
class Gather:
    """``y = x[rows]``, with what its deterministic backward needs: for each row of x, where it went in y."""

    rows: torch.Tensor
    """int64[K]."""
    bag: torch.Tensor
    """Rows of y grouped by the row of x they were taken from; int64[K]."""
    offsets: torch.Tensor
    """Where each row of x has its group in ``bag``; int64[T]."""

    @classmethod
    def build(cls, index: IntArray, rows: int) -> Gather | None:
        """Make the gather of ``index`` from ``rows`` rows; None for the identity."""
        if len(index) == rows and np.array_equal(index, np.arange(rows)):
            return None
        counts = np.bincount(index, minlength=rows)
        arrays = index, np.argsort(index, kind="stable"), np.cumsum(counts) - counts
        return cls(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def to(self, device: torch.device | str) -> Gather:
        """Return the gather with its tensors on ``device``."""
        return Gather(*(_move(tensor, device) for tensor in (self.rows, self.bag, self.offsets)))


@dataclass(frozen=True)
class RunSplit:
    """A row's attention: gather queries, keys and values, then one call per part, then put the queries back."""

    parts: tuple[Part, ...]
    """Causal runs, then full ones; a kind without runs is left out."""
    queries: Gather | None
    """Queries in the order of the parts; None when that is the row's own order."""
    outputs: Gather | None
    """The inverse of ``queries``: from the order of the parts back to the row's."""
    keys: Gather | None
    """Keys of all parts, one after another; None when every segment is one causal run."""

    def to(self, device: torch.device | str) -> RunSplit:
        """Return the tables on ``device``."""
        parts = tuple(part.to(device) for part in self.parts)
        gathers = (None if gather is None else gather.to(device) for gather in (self.queries, self.outputs, self.keys))
        return RunSplit(parts, *gathers)


def split_runs(policy: Policy, sidecars: Sidecars) -> RunSplit:
    """Cut a row into runs. O(T + gathered keys) time and memory.

    Raises UserError when an image does not fit the policy's grid.
    """
    table = policy.table(sidecars)
    order = None if policy.grid is None else _ring_order(table)
    if order is not None:
        table = table[order]
    runs = query_runs(policy, table)
    runs = runs.take(np.argsort(runs.full, kind="stable"))
    q_index, k_index = expand(runs.start, runs.end), expand(runs.span_start, runs.span_end)
    if order is not None:
        q_index, k_index = order[q_index], order[k_index]
    q_lengths, k_lengths, full = runs.end - runs.start, runs.key_counts, runs.full
    parts = [Part.build(not kind, q_lengths[full == kind], k_lengths[full == kind]) for kind in (False, True)]
    gathers = (Gather.build(index, len(table)) for index in (q_index, np.argsort(q_index), k_index))
    return RunSplit(tuple(part for part in parts if part.q_lengths), *gathers)


def expand(start: IntArray, end: IntArray) -> IntArray:
    """Concatenate the ranges ``start[n]..end[n]``; int64[sum of lengths]."""
    lengths = end - start
    ends = np.cumsum(lengths)
    shift: IntArray = np.repeat(start - (ends - lengths), lengths)
    return shift + np.arange(len(shift))


@dataclass(frozen=True)
class QueryRuns:
    """Query runs [start, end), each with the ranges of tokens that are its keys, in order."""

    start: IntArray
    end: IntArray
    full: BoolArray
    span_run: IntArray
    span_start: IntArray
    span_end: IntArray

    @property
    def key_counts(self) -> IntArray:
        """Keys per run."""
        counts = np.bincount(self.span_run, weights=self.span_end - self.span_start, minlength=len(self.start))
        return counts.astype(np.int64)

    def take(self, order: IntArray) -> QueryRuns:
        """Return the runs in another order (a permutation)."""
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        spans = np.argsort(rank[self.span_run], kind="stable")
        return QueryRuns(
            start=self.start[order],
            end=self.end[order],
            full=self.full[order],
            span_run=rank[self.span_run][spans],
            span_start=self.span_start[spans],
            span_end=self.span_end[spans],
        )


def query_runs(policy: Policy, table: TokenTable) -> QueryRuns:
    """Cut a row (its tokens in the order the policy is causal in) into runs, ascending."""
    index = np.arange(len(table))
    chunk = (index - run_first(run_starts(table.segment))) % PADDING_CHUNK == 0
    opens = run_starts(table.segment) | ((table.segment == 0) & chunk)
    if policy.unlock is None:
        start = np.flatnonzero(opens)
        end = np.append(start[1:], len(table))
        return QueryRuns(start, end, np.zeros(len(start), dtype=np.bool_), np.arange(len(start)), start, end)
    starts = opens | run_starts(table.modality, table.instance, table.generated, table.ring)
    atoms = _Atoms.build(policy, table, starts, run_first(opens))
    return atoms.merge()


@dataclass(frozen=True)
class _Atoms:
    """Maximal runs of tokens alike to every policy, and the pairs of them that the policy unlocks."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """Where the atom's segment begins."""
    full: BoolArray
    """Tokens of the atom see each other both ways."""
    left: IntArray
    """Unlocked pairs, ascending: atom ``left[n]`` sees all of the later atom ``right[n]``."""
    right: IntArray

    @classmethod
    def build(cls, policy: Policy, table: TokenTable, starts: BoolArray, segment_first: IntArray) -> _Atoms:
        """Find atoms and evaluate the policy once per pair of atoms within reach of each other."""
        assert policy.unlock is not None
        start = np.flatnonzero(starts)
        end = np.append(start[1:], len(table))
        heads = table[start]
        limit = heads.segment_end if policy.leaks else heads.commit
        own = np.arange(len(start))
        last = (np.cumsum(starts) - 1)[limit]
        left, right = np.repeat(own, last - own), expand(own + 1, last + 1)
        unlocked = policy.unlock(heads[left], heads[right])
        full = policy.unlock(heads, heads) & (limit >= end - 1) & (heads.segment > 0)
        return cls(start, end, segment_first[start], full, left[unlocked], right[unlocked])

    def merge(self) -> QueryRuns:
        """Join neighbours that see the same keys up to causality into runs."""
        count = np.bincount(self.left, minlength=len(self.start))
        head = np.flatnonzero(~self._joins_previous(count))
        tail = np.append(head[1:], len(self.start)) - 1
        start, end = self.start[head], self.end[tail]
        run_of = np.full(len(self.start), -1)
        run_of[tail] = np.arange(len(tail))
        kept = run_of[self.left] >= 0
        extra = self.right[kept]
        own = np.arange(len(head))
        span_run = np.concatenate([own, run_of[self.left[kept]], own])
        order = np.argsort(span_run, kind="stable")  # before the run, what is unlocked after it, the run itself
        span_start = np.concatenate([self.first_key[head], self.start[extra], start])
        span_end = np.concatenate([start, self.end[extra], end])
        return QueryRuns(start, end, self.full[tail], span_run[order], span_start[order], span_end[order])

    def _joins_previous(self, count: IntArray) -> BoolArray:
        """Mark atoms that see what the atom before them sees, but for causality within the two."""
        offset = np.cumsum(count) - count
        previous = np.maximum(np.arange(len(count)) - 1, 0)
        mine = np.arange(len(self.right)) - count[self.left]  # the end of the previous atom's list, aligned with mine
        differs = self.right[np.maximum(mine, 0)] != self.right
        same_later = np.bincount(self.left, weights=differs, minlength=len(count)) == 0
        more = count[previous] - count  # a full atom's list names its neighbour, a causal one's does not
        names_me = np.append(self.right, -1)[offset[previous]] == np.arange(len(count))
        alike = np.where(self.full, (more == 1) & names_me, more == 0)
        joins: BoolArray = (
            alike & same_later & (self.full == self.full[previous]) & (self.first_key == self.first_key[previous])
        )
        joins[:1] = False
        return joins


def _ring_order(table: TokenTable) -> IntArray:
    """Tokens with each image's sorted by ring, all others in place: in this order concentric attention is causal."""
    piece = np.cumsum(run_starts(table.segment, table.modality, table.instance))
    return np.lexsort((table.ring, piece))


def _move(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
