"""Reading tokenised samples back: whole columns for the plan, single samples for the packs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.arrow_files import BATCH_ROWS, open_batches
from data_prep.errors import UserError
from data_prep.workspace import Unit

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("family", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("generated", pa.list_(pa.uint8())),
        ("images", pa.list_(pa.int32())),  # index into the unit's distinct images, in order of instance
        ("n_tokens", pa.int32()),
        ("n_images", pa.int32()),
        ("n_target", pa.int32()),
        ("n_repeated", pa.int32()),  # tokens of earlier turns that another sample of the conversation holds too
        ("n_left_out", pa.int32()),  # answers of the conversation that no sample holds
        ("prompt_at", pa.int32()),  # where a prompt is to stand, or -1
        ("truncated", pa.bool_()),
        ("ended", pa.bool_()),  # whether the last supervised token ends a turn
        ("alterable", pa.int8()),  # what its text allows to be done to its images (data_prep.views)
    ]
)
"""One tokenised sample of a unit."""
_NUMBERS = ("n_tokens", "n_images", "n_target", "n_repeated", "n_left_out", "prompt_at")
_FLAGS = ("truncated", "ended")


@dataclass(frozen=True, slots=True)
class Columns:
    """Numbers of chosen samples of one corpus, in the order they were chosen; arrays of one length."""

    unit: npt.NDArray[np.int32]
    """Number of the unit within ``units``."""
    index: npt.NDArray[np.int32]
    """Number of the sample within its unit."""
    n_tokens: npt.NDArray[np.int32]
    n_images: npt.NDArray[np.int32]
    n_target: npt.NDArray[np.int32]
    n_repeated: npt.NDArray[np.int32]
    n_left_out: npt.NDArray[np.int32]
    prompt_at: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    ended: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.unit)


def read_columns(units: Sequence[Unit], kept: Sequence[int], chosen: npt.NDArray[np.int64]) -> Columns:
    """Read the numbers a plan needs of chosen samples; one unit is open at a time, and token ids stay on disk.

    Args:
        units: of one corpus.
        kept: samples of each unit.
        chosen: numbers of samples over all units, in any order, with repeats.

    Raises:
        UserError: a unit cannot be read, or holds another number of samples.
    """
    numbers, order = _sorted_with_places(chosen)
    starts = np.cumsum([0, *kept])
    bounds = np.searchsorted(numbers, starts)
    which = np.repeat(np.arange(len(units)), np.diff(bounds))
    numbers -= starts[which]
    kinds = dict.fromkeys(("unit", "index", *_NUMBERS), "int32") | dict.fromkeys(_FLAGS, "bool")
    columns: dict[str, npt.NDArray[Any]] = {name: np.empty(len(chosen), dtype=kind) for name, kind in kinds.items()}
    columns["unit"][order], columns["index"][order] = which, numbers
    for number, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        if first == last:
            continue
        table = pa.Table.from_batches(_open(units[number]))
        if table.num_rows != kept[number]:
            raise _unreadable(units[number], f"{table.num_rows} samples, its marker says {kept[number]}")
        for name in (*_NUMBERS, *_FLAGS):
            columns[name][order[first:last]] = table.column(name).to_numpy().take(numbers[first:last])
    return Columns(**columns)


def _sorted_with_places(numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return numbers in order, and where each stood; plain keys sort in half the time of an ``argsort``."""
    bits = len(numbers).bit_length()
    keys = np.sort(numbers << bits | np.arange(len(numbers)))
    return keys >> bits, keys & ((1 << bits) - 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sample."""

    name: str
    family: str
    input_ids: npt.NDArray[np.int32]
    generated: npt.NDArray[np.uint8]
    images: npt.NDArray[np.int64]
    """Rows of the image store."""
    prompt_at: int = -1
    """Where a prompt is to stand, or -1."""
    alterable: int = 0
    """What its text allows to be done to its images: bits of ``data_prep.views``."""


class SampleReader:
    """Random access to samples of many units; no unit stays open."""

    def __init__(self, units: Sequence[Unit], store: str) -> None:
        self._units, self._store = units, store

    def read(self, units: npt.NDArray[np.integer], indices: npt.NDArray[np.integer]) -> list[Sample]:
        """Return the samples ``indices`` of ``units``, in the given order; every unit is opened once.

        Args:
            units: numbers of units, in any order, with repeats.
            indices: numbers of samples within these units; of one length.
        """
        found: dict[int, Sample] = {}
        for number in np.unique(units).tolist():
            unit = self._units[number]
            batches, rows = _open(unit), np.fromfile(unit.rows(self._store), dtype=np.int64)
            for place in np.flatnonzero(units == number).tolist():
                index = int(indices[place])
                found[place] = _sample(batches[index // BATCH_ROWS], index % BATCH_ROWS, rows)
        return [found[place] for place in range(len(units))]


def _sample(batch: pa.RecordBatch, local: int, rows: npt.NDArray[np.int64]) -> Sample:
    return Sample(
        batch.column("sample")[local].as_py(),
        batch.column("family")[local].as_py(),
        batch.column("input_ids")[local].values.to_numpy().copy(),  # a view would keep the unit mapped
        batch.column("generated")[local].values.to_numpy().copy(),
        rows[batch.column("images")[local].values.to_numpy()],
        batch.column("prompt_at")[local].as_py(),
        batch.column("alterable")[local].as_py(),
    )


def _open(unit: Unit) -> list[pa.RecordBatch]:
    try:
        return open_batches(unit.tokens)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(unit, error) from error


def _unreadable(unit: Unit, why: object) -> UserError:
    return UserError(f"{unit.tokens}: cannot be read ({why}); delete its folder and run ingest again")
