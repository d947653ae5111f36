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


def read_stats(output: ShardOutput, kept: int) -> npt.NDArray[np.void]:
    """Return the ``SAMPLE_STATS`` of all samples of a shard output.

    Raises:
        UserError: the file cannot be read, is damaged, or holds a number of samples other than ``kept``.
    """
    data = Hashed(output.stats, output.report().stats_sha256, output.marker.name).read()
    if len(data) != kept * SAMPLE_STATS.itemsize:
        raise _unreadable(output.stats, f"{len(data) / SAMPLE_STATS.itemsize:g} samples, its marker says {kept}")
    return np.frombuffer(data, dtype=SAMPLE_STATS)


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
