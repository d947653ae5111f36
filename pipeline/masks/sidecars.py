"""Per-token sidecars of one packed row, and what is derived from them: commit indices, turns and positions.

A mask is never stored. Four integers per token say everything a policy needs; the rest is computed here in O(T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_prep.common.errors import UserError
from data_prep.common.modalities import IMAGE, MODALITIES, TEXT

if TYPE_CHECKING:  # pyarrow stays optional for whoever only computes masks
    from data_prep.packs import PackRow

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sidecars:
    """What the mask of one packed row is made of; every field is a 1-D integer tensor of length T.

    Raises UserError when lengths differ, a code is out of range, or the tokens of one segment are not contiguous.
    """

    segment: torch.Tensor
    """Which packed sample a token belongs to: 1, 2, ...; 0 = padding."""
    modality: torch.Tensor
    """0 text, 1 image, 2 video, 3 audio."""
    instance: torch.Tensor
    """Which medium of the row a token belongs to; -1 = text."""
    generated: torch.Tensor
    """1 where the model writes at inference (answers, captions), 0 where the token is given."""

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)

    def __len__(self) -> int:
        return self.segment.numel()

    @classmethod
    def from_row(cls, row: PackRow) -> Sidecars:
        """Take the sidecar columns of a pack row (copied: pack rows are read-only views of a file)."""
        return cls(**{field.name: torch.tensor(getattr(row, field.name)) for field in fields(cls)})

    @classmethod
    def concat(cls, rows: Sequence[Sidecars]) -> Sidecars:
        """Join rows into one long row: segments stay apart, and instances go on counting from row to row.

        The joined row's media are those of the rows in order, so image features are joined in the same order.
        Raises UserError for an empty list.
        """
        if not rows:
            raise UserError("a micro-batch of no rows has no sidecars: ask for at least one row")
        segments, instances, segment_base, instance_base = [], [], 0, 0
        for row in rows:
            segment, instance = row.segment.long(), row.instance.long()
            segments.append(torch.where(segment > 0, segment + segment_base, 0))
            instances.append(torch.where(instance >= 0, instance + instance_base, -1))
            segment_base += int(segment.max())
            instance_base += int(instance.max()) + 1
        return cls(
            segment=torch.cat(segments),
            modality=torch.cat([row.modality.long() for row in rows]),
            instance=torch.cat(instances),
            generated=torch.cat([row.generated.long() for row in rows]),
        )


class SpanColumns(NamedTuple):
    """The columns a policy's predicate may read (int64[T] each): token spans are cut wherever one of them changes.

    Masks and proofs evaluate a predicate once per pair of token spans. A column that changes inside a span would give
    a wrong mask and a wrong proof, so predicates get no other.
    """

    segment: IntArray
    modality: IntArray
    instance: IntArray
    generated: IntArray
    turn: IntArray
    """Number of generated runs that began in the segment at or before the token: 0 in the first given run."""
    ring: IntArray
    """Distance to the border of the image's grid; 0 without a grid."""

    def at(self, index: Any) -> SpanColumns:
        """Return these columns for the tokens of any index array, so one predicate serves masks and lists of pairs."""
        return SpanColumns(*(column[index] for column in self))


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Numpy columns of a row (int64[T] each): sidecars and what is derived from them."""

    segment: IntArray
    modality: IntArray
    instance: IntArray
    generated: IntArray
    commit: IntArray
    """See :func:`commit_index`."""
    segment_end: IntArray
    """Index of the last token of the segment (of the token itself in padding)."""
    turn: IntArray
    """Number of generated runs that began in the segment at or before the token: 0 in the first given run."""
    ring: IntArray
    """Distance to the border of the image's grid; 0 without a grid."""

    @property
    def span_columns(self) -> SpanColumns:
        """What policies may read of these tokens."""
        return SpanColumns(*(getattr(self, name) for name in SpanColumns._fields))

    def __getitem__(self, index: Any) -> TokenTable:
        return TokenTable(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.segment)


def token_table(sidecars: Sidecars, grid: tuple[int, int] | None = None) -> TokenTable:
    """Derive every column policies may read. ``grid`` (rows, columns) gives image tokens their rings.

    Raises UserError when ``grid`` is given and an image of the row is not one contiguous run of rows x columns tokens.
    """
    segment, modality, instance, generated = (
        getattr(sidecars, field.name).detach().cpu().numpy().astype(np.int64) for field in fields(sidecars)
    )
    starts = run_starts(segment)
    segment_start = run_first(starts)
    commit = _commit(segment, generated)
    segment_end = np.where(segment > 0, run_last(starts), np.arange(len(segment)))
    begins = (generated == 1) & (segment > 0) & run_starts(segment, generated)
    begun = np.cumsum(begins)
    turn = begun - (begun - begins)[segment_start]
    ring = np.zeros_like(segment) if grid is None else _rings(modality, instance, segment, grid)
    return TokenTable(segment, modality, instance, generated, commit, segment_end, turn, ring)


def commit_index(sidecars: Sidecars) -> torch.Tensor:
    """Return c, int64[T]: the last token each token may depend on without leaking anything generated.

    c(i) = i for generated tokens (and padding); for a given token it is the last index of the maximal run of given
    tokens of its segment that contains i. A mask with ``allowed(i, j) => j <= c(i)`` in every layer leaks no target
    and can be decoded with a KV cache exactly.
    """
    segment, generated = (x.detach().cpu().numpy().astype(np.int64) for x in (sidecars.segment, sidecars.generated))
    return torch.from_numpy(_commit(segment, generated)).to(sidecars.segment.device)


def position_ids(sidecars: Sidecars, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Return positions, int64[T], counted from 0 in every segment (and 0 in padding).

    With ``grid`` (rows, columns) image tokens take concentric positions (Concentric Causal Attention,
    arXiv 2410.15926): the image's start plus the token's ring; what follows goes on after the last ring.
    """
    table = token_table(sidecars, grid)
    step = np.ones(len(table), dtype=np.int64)
    if grid is not None:
        image = table.modality == IMAGE
        last = run_last(run_starts(table.segment, table.instance)) == np.arange(len(table))
        step[image] = np.where(last[image], ring_count(grid), 0)
    before = np.cumsum(step) - step
    position = before - before[run_first(run_starts(table.segment))] + table.ring
    return torch.from_numpy(np.where(table.segment > 0, position, 0)).to(sidecars.segment.device)


def run_starts(*columns: npt.NDArray[Any]) -> BoolArray:
    """Mark the first token of every maximal run in which all columns are constant; bool[T]."""
    starts = np.zeros(len(columns[0]), dtype=np.bool_)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts


def run_first(starts: BoolArray) -> IntArray:
    """Return for each token the index of the first token of its run; int64[T]."""
    index = np.arange(len(starts))
    return np.maximum.accumulate(np.where(starts, index, 0))


def run_last(starts: BoolArray) -> IntArray:
    """Return for each token the index of the last token of its run; int64[T]."""
    first = np.flatnonzero(starts)
    return np.repeat(np.append(first[1:], len(starts)) - 1, np.diff(np.append(first, len(starts))))


def ring_count(grid: tuple[int, int]) -> int:
    """Number of concentric rings of a grid of (rows, columns) patches."""
    return (min(grid) + 1) // 2


def _commit(segment: IntArray, generated: IntArray) -> IntArray:
    given = (generated == 0) & (segment > 0)
    return np.where(given, run_last(run_starts(segment, generated)), np.arange(len(segment)))


def _rings(modality: IntArray, instance: IntArray, segment: IntArray, grid: tuple[int, int]) -> IntArray:
    rows, columns = grid
    starts = run_starts(segment, modality, instance)
    image = modality == IMAGE
    first = run_first(starts)
    lengths = run_last(starts) - first + 1
    if np.any(wrong := image & (lengths != rows * columns)):
        where = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"image {instance[where]} at token {where} has {lengths[where]} tokens, its grid {rows} x {columns}: "
            "give the connector's grid, or choose a policy without one (mma, mixed)"
        )
    row, column = np.divmod(np.arange(len(segment)) - first, columns)
    ring = np.minimum(np.minimum(row, rows - 1 - row), np.minimum(column, columns - 1 - column))
    return np.where(image, ring, 0)


def _check_shapes(sidecars: Sidecars) -> None:
    columns = {field.name: getattr(sidecars, field.name) for field in fields(sidecars)}
    for name, column in columns.items():
        if column.dim() != 1 or column.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise UserError(
                f"sidecar {name} must be a 1-D integer tensor, got {column.dtype} of shape {tuple(column.shape)}: "
                "join the rows of a micro-batch with Sidecars.concat"
            )
    if len({column.numel() for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {column.numel()}" for name, column in columns.items())
        raise UserError(f"sidecars of one row must have one length, got {lengths}: the pack is damaged, make it again")


def _check_values(sidecars: Sidecars) -> None:
    segment, modality, instance, generated = (
        getattr(sidecars, field.name).detach().cpu().numpy() for field in fields(sidecars)
    )
    bad = {
        "segment below 0": segment < 0,
        f"modality outside 0..{len(MODALITIES) - 1}": (modality < 0) | (modality >= len(MODALITIES)),
        "generated that is neither 0 nor 1": (generated != 0) & (generated != 1),
        "generated medium (the model writes text only)": (generated == 1) & (modality != TEXT),
        "text with an instance, or a medium without one": (modality == TEXT) != (instance < 0),
    }
    for fault, where in bad.items():
        if where.any():
            raise UserError(f"token {int(where.argmax())} has a {fault}: the pack is damaged, make it again")
    heads = segment[run_starts(segment)]
    ids, counts = np.unique(heads[heads > 0], return_counts=True)
    if np.any(counts > 1):
        raise UserError(
            f"segment {ids[counts > 1][0]} appears in several pieces of the row: a packed sample must be contiguous, "
            "and rows of a micro-batch are joined with Sidecars.concat"
        )
