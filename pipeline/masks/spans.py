"""A row as token spans: maximal runs of tokens that no policy can tell apart, and the pairs a policy unlocks.

In terms of spans a mask is small. A token sees the earlier tokens of its segment, its whole span if that span is
bidirectional, and every later span unlocked for its own. Plans and proofs work on this form in time proportional to
the row and the unlocked pairs; no T x T array is built.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.masks.policies import Policy, Unlock
from pipeline.masks.sidecars import BoolArray, IntArray, SpanColumns, TokenTable, run_first, run_starts

PAIRS_PER_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """Token spans [start, end) of a row in order; int64[N] unless stated."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """First key of every token in the span: the start of its segment."""
    bidirectional: BoolArray
    """Tokens of the span see each other both ways; bool[N]."""
    left: IntArray
    """Unlocked pairs, ascending: span ``left[p]`` sees all of the later span ``right[p]``; int64[P]."""
    right: IntArray
    """int64[P]."""

    def __len__(self) -> int:
        return len(self.start)


def token_spans(policy: Policy, table: TokenTable, segment_starts: BoolArray) -> TokenSpans:
    """Split a row into token spans and evaluate the policy once for each pair of spans within its clamp.

    Args:
        policy: its predicate decides which pairs are unlocked.
        table: the row's T tokens, in the order of :func:`causal_order`.
        segment_starts: bool[T], True where a segment begins; padding may be split into any number of segments.
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
    """Return the unlocked pairs (span, later span up to ``last[span]``), evaluated in batches of bounded size."""
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
    """Return the token order, int64[T], in which the policy is causal between spans; None for the row's own order.

    Concentric attention (arXiv 2410.15926) is causal once the tokens of every image are sorted by ring; all other
    tokens keep their places.
    """
    if policy.grid is None:
        return None
    run = np.cumsum(run_starts(table.segment, table.modality, table.instance))
    return np.lexsort((table.ring, run))


def expand(start: IntArray, end: IntArray) -> IntArray:
    """Concatenate the ranges ``start[n] .. end[n] - 1``; int64[sum of lengths]."""
    lengths = end - start
    ends = np.cumsum(lengths)
    shift: IntArray = np.repeat(start - (ends - lengths), lengths)
    return shift + np.arange(len(shift))
