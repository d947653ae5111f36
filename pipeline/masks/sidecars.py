"""Per-token sidecars of one packed row, and the columns derived from them: commit indices, turns and positions.

Masks are never stored. Four integers per token hold everything a policy needs; the rest is derived here in O(T).
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

if TYPE_CHECKING:  # computing masks needs no pyarrow
    from data_prep.packs import PackRow

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sidecars:
    """The four per-token columns that define the mask of a packed row; each a 1-D integer tensor of length T.

    Raises UserError when lengths differ, a code is out of range, or the tokens of one segment are not contiguous.
    """

    segment: torch.Tensor
    """Packed sample of the token: 1, 2, ...; 0 = padding."""
    modality: torch.Tensor
    """0 text, 1 image, 2 video, 3 audio."""
    instance: torch.Tensor
    """Medium of the token, counted from 0 in the row; -1 = text."""
    generated: torch.Tensor
    """1 for tokens the model writes at inference (answers, captions), 0 for given tokens."""

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)

    def __len__(self) -> int:
        return self.segment.numel()

    @classmethod
    def from_row(cls, row: PackRow) -> Sidecars:
        """Copy the sidecar columns of a packed row (rows are read-only views of a file)."""
        return cls(**{field.name: torch.tensor(getattr(row, field.name)) for field in fields(cls)})

    @classmethod
    def concat(cls, rows: Sequence[Sidecars]) -> Sidecars:
        """Join rows into one long row: segments stay separate, and instance numbers continue from row to row.

        Media keep the order of the rows, so image features are concatenated in the same order.
        Raises UserError for an empty list.
        """
        if not rows:
            raise UserError("a micro-batch of no rows has no sidecars: give at least one row")
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
    """The columns a policy's predicate may read, int64[T] each; a new token span begins wherever one of them changes.

    Masks and proofs evaluate a predicate once per pair of token spans. A column that changed inside a span would give
    a wrong mask and a wrong proof, so predicates see no other column.
    """

    segment: IntArray
    modality: IntArray
    instance: IntArray
    generated: IntArray
    turn: IntArray
    """Generated runs of the segment that begin at or before the token: 0 in the first given run."""
    ring: IntArray
    """Distance to the border of the image's grid; 0 without a grid."""

    def at(self, index: Any) -> SpanColumns:
        """Return the columns at any index array, so one predicate serves dense masks and lists of pairs."""
        return SpanColumns(*(column[index] for column in self))


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A row as numpy columns, int64[T] each: its sidecars and the columns derived from them."""

    segment: IntArray
    modality: IntArray
    instance: IntArray
    generated: IntArray
    commit: IntArray
    """See :func:`commit_index`."""
    segment_end: IntArray
    """Index of the segment's last token (in padding, of the token itself)."""
    turn: IntArray
    """Generated runs of the segment that begin at or before the token: 0 in the first given run."""
    ring: IntArray
    """Distance to the border of the image's grid; 0 without a grid."""

    @property
    def span_columns(self) -> SpanColumns:
        """The columns that policies may read."""
        return SpanColumns(*(getattr(self, name) for name in SpanColumns._fields))

    def __getitem__(self, index: Any) -> TokenTable:
        return TokenTable(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.segment)


def token_table(sidecars: Sidecars, grid: tuple[int, int] | None = None) -> TokenTable:
    """Derive all columns of a row; with ``grid`` (rows, columns of patches) image tokens get their ring.

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
    """Return the commit index c, int64[T]: the last token that each token may depend on.

    c(i) = i for generated tokens and padding; for a given token c(i) is the end of the maximal run of given tokens
    of its segment that contains i. If ``allowed(i, j)`` implies ``j <= c(i)`` in every layer, no target leaks, and
    decoding with a KV cache is exact.
    """
    segment, generated = (x.detach().cpu().numpy().astype(np.int64) for x in (sidecars.segment, sidecars.generated))
    return torch.from_numpy(_commit(segment, generated)).to(sidecars.segment.device)


def position_ids(sidecars: Sidecars, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Return positions, int64[T], counted from 0 in every segment; padding has 0.

    With ``grid`` (rows, columns) image tokens take concentric positions (Concentric Causal Attention,
    arXiv 2410.15926): the image's start plus the token's ring. Later tokens continue after the last ring.

    Raises UserError as :func:`token_table` does.
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
    """Mark the first token of every maximal run over which all columns are constant; bool[T]."""
    starts = np.zeros(len(columns[0]), dtype=np.bool_)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts


def run_first(starts: BoolArray) -> IntArray:
    """Return the index of the first token of each token's run; int64[T]."""
    index = np.arange(len(starts))
    return np.maximum.accumulate(np.where(starts, index, 0))


def run_last(starts: BoolArray) -> IntArray:
    """Return the index of the last token of each token's run; int64[T]."""
    first = np.flatnonzero(starts)
    return np.repeat(np.append(first[1:], len(starts)) - 1, np.diff(np.append(first, len(starts))))


def ring_count(grid: tuple[int, int]) -> int:
    """Return the number of concentric rings of a grid of (rows, columns) patches."""
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
            f"image {instance[where]} at token {where} has {lengths[where]} tokens, but its grid is {rows} x "
            f"{columns}: give the connector's grid, or choose a policy that needs none (mma, mixed)"
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
        raise UserError(f"sidecars of one row must have equal lengths, got {lengths}: the row is damaged, rebuild it")


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
            raise UserError(f"token {int(where.argmax())} has a {fault}: the row is damaged, rebuild it")
    heads = segment[run_starts(segment)]
    ids, counts = np.unique(heads[heads > 0], return_counts=True)
    if np.any(counts > 1):
        raise UserError(
            f"segment {ids[counts > 1][0]} is not contiguous: the tokens of a packed sample must be adjacent; "
            "join the rows of a micro-batch with Sidecars.concat"
        )
