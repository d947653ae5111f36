"""Reading tokenised samples back: their stats for the plan, full samples for the packs."""

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
from data_prep.common.files import REBUILD, Hashed
from data_prep.ingest.store_rows import read_store_rows
from data_prep.ingest.workspace import ShardOutput

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("family", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("generated", pa.list_(pa.uint8())),
        ("images", pa.list_(pa.int32())),  # index into the distinct images of the shard output, in order of instance
        ("prompt_at", pa.int32()),  # position for a prompt, or -1
        ("allowed", pa.int8()),  # augmentations its text allows (data_prep.images.augment)
    ]
)
"""One tokenised sample."""
_STAT_FIELDS = [
    ("tokens", "<i4"),
    ("images", "<i4"),
    ("targets", "<i4"),  # supervised tokens
    ("repeated", "<i4"),  # tokens of earlier turns that another sample of the conversation also holds
    ("image_tokens", "<i4"),  # of all its images
    ("left_out", "<i4"),  # answers of the conversation that no sample holds
    ("prompted", "?"),  # whether it takes a prompt
    ("truncated", "?"),
    ("ended", "?"),  # whether the last supervised token ends a turn
]
SAMPLE_STATS = np.dtype(_STAT_FIELDS, align=True)
"""What a plan needs to know about a sample. In a separate file, because planning reads nothing else."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Chosen samples of one corpus, in storage order; arrays of equal length."""

    place: npt.NDArray[np.int64]
    """Position of the sample in the order it was chosen."""
    shard: npt.NDArray[np.int32]
    """Index into ``outputs``."""
    index: npt.NDArray[np.int32]
    """Index of the sample in its shard output."""
    stats: npt.NDArray[np.void]
    """``SAMPLE_STATS`` of the sample."""

    def __len__(self) -> int:
        return len(self.shard)


def read_sample_stats(outputs: Sequence[ShardOutput], kept: Sequence[int], chosen: npt.NDArray[np.int64]) -> Chosen:
    """Read the stats of chosen samples; one shard output is open at a time.

    Args:
        outputs: shard outputs of one corpus.
        kept: number of samples of each.
        chosen: sample numbers over all of them, in any order, with repeats.

    Raises:
        UserError: a file cannot be read, is damaged, or holds a different number of samples.
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
    """Return the stats of all samples of a shard output. Raises UserError."""
    data = Hashed(output.stats, output.report().stats_sha256, output.marker.name).read()
    if len(data) != kept * SAMPLE_STATS.itemsize:
        raise _unreadable(output.stats, f"{len(data) / SAMPLE_STATS.itemsize:g} samples, its marker says {kept}")
    return np.frombuffer(data, dtype=SAMPLE_STATS)


def _sorted_with_places(numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return sorted numbers and the position of each; sorting packed keys takes half the time of an ``argsort``."""
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
    """Position for a prompt, or -1."""
    allowed: int = 0
    """Augmentations its text allows: bits of ``data_prep.images.augment``."""


class SampleReader:
    """Random access to the samples of many shard outputs; none stays open."""

    def __init__(self, outputs: Sequence[ShardOutput], store: str) -> None:
        self._outputs, self._store = outputs, store

    def read(self, outputs: npt.NDArray[np.integer], indices: npt.NDArray[np.integer]) -> list[Sample]:
        """Return samples in the given order; every shard output is opened once.

        Args:
            outputs: int[N], indices of shard outputs, in any order, with repeats.
            indices: int[N], indices of samples in these shard outputs.
        """
        found: dict[int, Sample] = {}
        batch = indices // BATCH_ROWS
        order = np.lexsort((batch, outputs))  # samples of one batch are read together
        changes = np.flatnonzero((np.diff(outputs[order]) != 0) | (np.diff(batch[order]) != 0)) + 1
        opened = -1
        for places in np.split(order, changes) if len(order) else ():
            number = int(outputs[places[0]])
            if number != opened:
                batches, opened = _open(self._outputs[number]), number
                rows = read_store_rows(self._outputs[number].rows(self._store))
            samples = _samples(batches[batch[places[0]]], indices[places] % BATCH_ROWS, rows)
            found.update(zip(places.tolist(), samples, strict=True))
        return [found[place] for place in range(len(outputs))]


def _samples(batch: pa.RecordBatch, wanted: npt.NDArray[np.integer], rows: npt.NDArray[np.int64]) -> Iterator[Sample]:
    """Return samples of a batch, copied: views would keep the file mapped."""
    taken = batch.take(pa.array(wanted))
    ids, generated, images = (_parts(taken.column(name)) for name in ("input_ids", "generated", "images"))
    name, family, prompt_at, allowed = (
        taken.column(name).to_pylist() for name in ("sample", "family", "prompt_at", "allowed")
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
    return UserError(f"{path}: cannot be used ({why}); {REBUILD}")
