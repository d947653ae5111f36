"""A row as atoms: maximal runs of tokens alike to every policy, and the pairs of them a policy unlocks.

In atom terms a mask is small: a token sees what comes before it in its segment, all of its own atom where that is
full, and all of each later atom that is unlocked for its own. Plans and proofs are computed on this form in time
proportional to the row and to the unlocked pairs, without any T x T array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.masks.policies import Policy, Unlock
from pipeline.masks.sidecars import BoolArray, IntArray, SpanColumns, TokenTable, run_first, run_starts

PAIRS_PER_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """TokenSpans [start, end) in order; the first key of all of an atom's tokens is ``first_key``."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """Where the atom's segment begins."""
    bidirectional: BoolArray
    """Tokens of the atom see each other both ways."""
    left: IntArray
    """Unlocked pairs, ascending: atom ``left[n]`` sees all of the later atom ``right[n]``."""
    right: IntArray

    def __len__(self) -> int:
        return len(self.start)


def token_spans(policy: Policy, table: TokenTable, segment_starts: BoolArray) -> TokenSpans:
    """Cut a row into atoms and evaluate the policy once per pair of them within reach of each other.

    Args:
        policy: whose predicate decides.
        table: the row's tokens, in the order of :func:`causal_order`.
        segment_starts: where segments begin; padding may be cut into any number of them. bool[T].
    """
    first = run_first(segment_starts)
    if policy.unlock is None:
        start = np.flatnonzero(segment_starts)
        none = np.zeros(0, dtype=np.int64)
        return TokenSpans(
            start, np.append(start[1:], len(table)), start, np.zeros(len(start), dtype=np.bool_), none, none
        )
    starts = segment_starts | run_starts(*table.span_columns)
    start = np.flatnonzero(starts)
    end = np.append(start[1:], len(table))
    heads = table[start]
    limit = heads.segment_end if policy.leaks else heads.commit
    last = (np.cumsum(starts) - 1)[limit]
    columns = heads.span_columns
    bidirectional = policy.unlock(columns, columns) & (limit >= end - 1) & (heads.segment > 0)
    return TokenSpans(start, end, first[start], bidirectional, *_unlocked_pairs(policy.unlock, columns, last))


def _unlocked_pairs(unlock: Unlock, heads: SpanColumns, last: IntArray) -> tuple[IntArray, IntArray]:
    """Return the pairs (atom, later atom up to ``last[atom]``) that are unlocked, evaluated in bounded batches."""
    own = np.arange(len(last))
    batch = np.cumsum(last - own) // PAIRS_PER_BATCH
    lefts, rights = [], []
    for spans in np.split(own, np.flatnonzero(np.diff(batch)) + 1):
        left, right = np.repeat(spans, last[spans] - spans), expand(spans + 1, last[spans] + 1)
        unlocked = unlock(heads.at(left), heads.at(right))
        lefts.append(left[unlocked])
        rights.append(right[unlocked])
    return np.concatenate(lefts), np.concatenate(rights)


def causal_order(policy: Policy, table: TokenTable) -> IntArray | None:
    """Return the order of tokens in which the policy is causal between atoms; None for the row's own order.

    Concentric attention is causal when every image's tokens are sorted by ring, all others staying in place.
    """
    if policy.grid is None:
        return None
    piece = np.cumsum(run_starts(table.segment, table.modality, table.instance))
    return np.lexsort((table.ring, piece))


def expand(start: IntArray, end: IntArray) -> IntArray:
    """Concatenate the ranges ``start[n]..end[n]`` (ends excluded); int64[sum of lengths]."""
    lengths = end - start
    ends = np.cumsum(lengths)
    shift: IntArray = np.repeat(start - (ends - lengths), lengths)
    return shift + np.arange(len(shift))
