"""A row as atoms: maximal runs of tokens alike to every policy, and the pairs of them a policy unlocks.

In atom terms a mask is small: a token sees what comes before it in its segment, all of its own atom where that is
full, and all of each later atom that is unlocked for its own. Plans and proofs are computed on this form in time
proportional to the row and to the unlocked pairs, without any T x T array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.masks.policies import Policy, Unlock
from pipeline.masks.sidecars import BoolArray, IntArray, TokenTable, run_first, run_starts

PAIRS_PER_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class Atoms:
    """Atoms [start, end) in order; the first key of all of an atom's tokens is ``first_key``."""

    start: IntArray
    end: IntArray
    first_key: IntArray
    """Where the atom's segment begins."""
    full: BoolArray
    """Tokens of the atom see each other both ways."""
    left: IntArray
    """Unlocked pairs, ascending: atom ``left[n]`` sees all of the later atom ``right[n]``."""
    right: IntArray

    def __len__(self) -> int:
        return len(self.start)


def cut_atoms(policy: Policy, table: TokenTable, opens: BoolArray) -> Atoms:
    """Cut a row into atoms and evaluate the policy once per pair of them within reach of each other.

    Args:
        policy: whose predicate decides.
        table: the row's tokens, in the order of :func:`causal_order`.
        opens: where segments begin; padding may be cut into any number of them. bool[T].
    """
    first = run_first(opens)
    if policy.unlock is None:
        start = np.flatnonzero(opens)
        none = np.zeros(0, dtype=np.int64)
        return Atoms(start, np.append(start[1:], len(table)), start, np.zeros(len(start), dtype=np.bool_), none, none)
    starts = opens | run_starts(table.modality, table.instance, table.generated, table.ring)
    start = np.flatnonzero(starts)
    end = np.append(start[1:], len(table))
    heads = table[start]
    limit = heads.segment_end if policy.leaks else heads.commit
    last = (np.cumsum(starts) - 1)[limit]
    full = policy.unlock(heads, heads) & (limit >= end - 1) & (heads.segment > 0)
    return Atoms(start, end, first[start], full, *_unlocked_pairs(policy.unlock, heads, last))


def _unlocked_pairs(unlock: Unlock, heads: TokenTable, last: IntArray) -> tuple[IntArray, IntArray]:
    """Return the pairs (atom, later atom up to ``last[atom]``) that are unlocked, evaluated in bounded batches."""
    own = np.arange(len(last))
    batch = np.cumsum(last - own) // PAIRS_PER_BATCH
    lefts, rights = [], []
    for atoms in np.split(own, np.flatnonzero(np.diff(batch)) + 1):
        left, right = np.repeat(atoms, last[atoms] - atoms), expand(atoms + 1, last[atoms] + 1)
        unlocked = unlock(heads[left], heads[right])
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
