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

from pipeline.masks.atoms import Atoms, cut_atoms, expand
from pipeline.masks.policies import Policy
from pipeline.masks.sidecars import BoolArray, IntArray, TokenTable, run_first, run_starts

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
    """Where each row of x has its group in ``bag``, and the total; int64[T + 1]."""

    @classmethod
    def build(cls, index: IntArray, rows: int) -> Gather | None:
        """Make the gather of ``index`` from ``rows`` rows; None for the identity."""
        return None if len(index) == rows and np.array_equal(index, np.arange(rows)) else cls.of(index, rows)

    @classmethod
    def of(cls, index: IntArray, rows: int) -> Gather:
        """Make the gather of ``index`` from ``rows`` rows."""
        ends = np.cumsum(np.bincount(index, minlength=rows))
        arrays = index, np.argsort(index, kind="stable"), np.append(0, ends)
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


def split_runs(runs: QueryRuns, order: IntArray | None, tokens: int) -> RunSplit:
    """Turn a row's runs into attention calls; O(T + gathered keys) time and memory.

    Args:
        runs: of the row, its tokens in the policy's causal order.
        order: that order; None for the row's own.
        tokens: T.
    """
    runs = runs.take(np.argsort(runs.full, kind="stable"))
    q_index, k_index = expand(runs.start, runs.end), expand(runs.span_start, runs.span_end)
    if order is not None:
        q_index, k_index = order[q_index], order[k_index]
    q_lengths, k_lengths, full = runs.end - runs.start, runs.key_counts, runs.full
    parts = [Part.build(not kind, q_lengths[full == kind], k_lengths[full == kind]) for kind in (False, True)]
    gathers = (Gather.build(index, tokens) for index in (q_index, np.argsort(q_index), k_index))
    return RunSplit(tuple(part for part in parts if part.q_lengths), *gathers)


@dataclass(frozen=True)
class QueryRuns:
    """Query runs [start, end), each with the ranges of tokens that are its keys, in order."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """Where the run's segment begins."""
    full: BoolArray
    """Tokens of the run see each other both ways."""
    span_run: IntArray
    """The run each range of keys belongs to, ascending."""
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
            first_key=self.first_key[order],
            full=self.full[order],
            span_run=rank[self.span_run][spans],
            span_start=self.span_start[spans],
            span_end=self.span_end[spans],
        )


def query_runs(policy: Policy, table: TokenTable) -> QueryRuns:
    """Cut a row (its tokens in the policy's causal order) into runs, ascending."""
    index = np.arange(len(table))
    chunk = (index - run_first(run_starts(table.segment))) % PADDING_CHUNK == 0
    opens = run_starts(table.segment) | ((table.segment == 0) & chunk)
    return _merge(cut_atoms(policy, table, opens))


def _merge(atoms: Atoms) -> QueryRuns:
    """Join neighbours that see the same keys up to causality into runs."""
    head = np.flatnonzero(~_joins_previous(atoms))
    tail = np.append(head[1:], len(atoms)) - 1
    start, end = atoms.start[head], atoms.end[tail]
    run_of = np.full(len(atoms), -1)
    run_of[tail] = np.arange(len(tail))
    kept = run_of[atoms.left] >= 0
    later = atoms.right[kept]
    own = np.arange(len(head))
    span_run = np.concatenate([own, run_of[atoms.left[kept]], own])
    order = np.argsort(span_run, kind="stable")  # before the run, what is unlocked after it, the run itself
    first_key, full = atoms.first_key[head], atoms.full[tail]
    span_start = np.concatenate([first_key, atoms.start[later], start])
    span_end = np.concatenate([start, atoms.end[later], end])
    return QueryRuns(start, end, first_key, full, span_run[order], span_start[order], span_end[order])


def _joins_previous(atoms: Atoms) -> BoolArray:
    """Mark atoms that see what the atom before them sees, but for causality within the two."""
    own = np.arange(len(atoms))
    previous = np.maximum(own - 1, 0)
    count = np.bincount(atoms.left, minlength=len(atoms))
    offset = np.cumsum(count) - count
    # The list of the atom before ends where mine begins, so its tail lies one length of mine earlier.
    tail = np.maximum(np.arange(len(atoms.right)) - count[atoms.left], 0)
    differs = atoms.right[tail] != atoms.right
    same_later = np.bincount(atoms.left, weights=differs, minlength=len(atoms)) == 0
    more = count[previous] - count  # a full atom's list names its neighbour first, a causal one's does not
    names_me = np.append(atoms.right, -1)[offset[previous]] == own
    alike = np.where(atoms.full, (more == 1) & names_me, more == 0)
    same_kind = atoms.full == atoms.full[previous]
    joins: BoolArray = alike & same_later & same_kind & (atoms.first_key == atoms.first_key[previous])
    joins[:1] = False
    return joins


def _move(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
