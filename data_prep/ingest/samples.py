"""Reading tokenised samples back: their numbers for the plan, whole samples for the packs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.common.arrow_files import BATCH_ROWS, open_batches
from data_prep.common.errors import UserError
from data_prep.ingest.workspace import ShardOutput

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("family", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("generated", pa.list_(pa.uint8())),
        ("images", pa.list_(pa.int32())),  # index into the unit's distinct images, in order of instance
        ("prompt_at", pa.int32()),  # where a prompt is to stand, or -1
        ("alterable", pa.int8()),  # what its text allows to be done to its images (data_prep.images.augment)
    ]
)
"""One tokenised sample of a unit."""
_FACTS = [
    ("tokens", "<i4"),
    ("images", "<i4"),
    ("targets", "<i4"),  # supervised tokens
    ("repeated", "<i4"),  # tokens of earlier turns that another sample of the conversation holds too
    ("left_out", "<i4"),  # answers of the conversation that no sample holds
    ("prompted", "?"),  # whether it takes a prompt
    ("truncated", "?"),
    ("ended", "?"),  # whether the last supervised token ends a turn
]
SAMPLE_STATS = np.dtype(_FACTS, align=True)
"""What a plan needs to know of a sample. A file of its own: planning reads these of every unit, and nothing else."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Chosen samples of one corpus, in the order they are stored; arrays of one length."""

    place: npt.NDArray[np.int64]
    """Where the sample stood among the chosen ones."""
    shard: npt.NDArray[np.int32]
    """Number of the unit within ``units``."""
    index: npt.NDArray[np.int32]
    """Number of the sample within its unit."""
    stats: npt.NDArray[np.void]
    """``SAMPLE_STATS`` of the sample."""

    def __len__(self) -> int:
        return len(self.shard)


def read_sample_stats(outputs: Sequence[ShardOutput], kept: Sequence[int], chosen: npt.NDArray[np.int64]) -> Chosen:
    """Read what a plan needs to know of chosen samples; one unit is open at a time.

    Args:
        outputs: of one corpus.
        kept: samples of each unit.
        chosen: numbers of samples over all units, in any order, with repeats.

    Raises:
        UserError: a unit cannot be read, or holds another number of samples.
    """
    numbers, place = _sorted_with_places(chosen)
    starts = np.cumsum([0, *kept])
    bounds = np.searchsorted(numbers, starts)
    which = np.repeat(np.arange(len(outputs), dtype=np.int32), np.diff(bounds))
    numbers -= starts[which]
    stats = np.empty(len(chosen), dtype=SAMPLE_STATS)
    for output, count, (first, last) in zip(outputs, kept, itertools.pairwise(bounds.tolist()), strict=True):
        if first < last:
            _stats_of(output, count).take(
                numbers[first:last], out=stats[first:last], mode="clip"
            )  # fancy indexing: 30 x
    return Chosen(place, which, numbers.astype(np.int32), stats)


def _stats_of(output: ShardOutput, kept: int) -> npt.NDArray[np.void]:
    """Return the facts of all samples of a unit. Raises UserError."""
    try:
        data = output.stats.read_bytes()
    except OSError as error:
        raise _unreadable(output.stats, error) from error
    if len(data) != kept * SAMPLE_STATS.itemsize:
        raise _unreadable(output.stats, f"{len(data) / SAMPLE_STATS.itemsize:g} samples, its marker says {kept}")
    return np.frombuffer(data, dtype=SAMPLE_STATS)


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
    allowed: int = 0
    """What its text allows to be done to its images: bits of ``data_prep.images.augment``."""


class SampleReader:
    """Random access to samples of many units; no unit stays open."""

    def __init__(self, outputs: Sequence[ShardOutput], store: str) -> None:
        self._units, self._store = outputs, store

    def read(self, outputs: npt.NDArray[np.integer], indices: npt.NDArray[np.integer]) -> list[Sample]:
        """Return the samples ``indices`` of ``units``, in the given order; every unit is opened once.

        Args:
            outputs: numbers of units, in any order, with repeats.
            indices: numbers of samples within these units; of one length.
        """
        found: dict[int, Sample] = {}
        batch = indices // BATCH_ROWS
        order = np.lexsort((batch, outputs))  # samples of one batch are read together
        changes = np.flatnonzero((np.diff(outputs[order]) != 0) | (np.diff(batch[order]) != 0)) + 1
        opened = -1
        for places in np.split(order, changes) if len(order) else ():
            number = int(outputs[places[0]])
            if number != opened:
                batches, opened = _open(self._units[number]), number
                rows = np.fromfile(self._units[number].rows(self._store), dtype=np.int64)
            samples = _samples(batches[batch[places[0]]], indices[places] % BATCH_ROWS, rows)
            found.update(zip(places.tolist(), samples, strict=True))
        return [found[place] for place in range(len(outputs))]


def _samples(batch: pa.RecordBatch, wanted: npt.NDArray[np.integer], rows: npt.NDArray[np.int64]) -> Iterator[Sample]:
    """Return samples of a batch; they are copied out of it, or they would keep the unit mapped."""
    taken = batch.take(pa.array(wanted))
    ids, generated, images = (_parts(taken.column(name)) for name in ("input_ids", "generated", "images"))
    name, family, prompt_at, allowed = (
        taken.column(name).to_pylist() for name in ("sample", "family", "prompt_at", "alterable")
    )
    return map(Sample, name, family, ids, generated, (rows[part] for part in images), prompt_at, allowed)


def _parts(column: pa.ListArray) -> list[npt.NDArray[Any]]:
    """Return the lists of a column as arrays."""
    values = column.values.to_numpy()
    return [values[start:stop] for start, stop in itertools.pairwise(column.offsets.to_numpy().tolist())]


def _open(output: ShardOutput) -> list[pa.RecordBatch]:
    try:
        return open_batches(output.tokens)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(output.tokens, error) from error


def _unreadable(path: Path, why: object) -> UserError:
    return UserError(f"{path}: cannot be read ({why}); delete its folder and run ingest again")
