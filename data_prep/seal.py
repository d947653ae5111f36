"""Sealing the image store: the distinct images of all units, gathered in order of first use.

Hashes are compared range by range and images are copied shard by shard, so memory does not grow with the corpus; what
grows is a mapped file with 8 bytes for every image of every unit. Any process may write any shard.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.arrow_files import ArrowFile, atomic_path, open_batches
from data_prep.digests import Digests
from data_prep.errors import UserError
from data_prep.images import IMAGE_SCHEMA, STORE_FORMAT, STORE_VERSION, ImageStore
from data_prep.packs import write_atomic
from data_prep.workers import Team
from data_prep.workspace import Unit

SHARD_BYTES = 64 << 20
"""A store shard is closed when it holds this much: it is one Arrow batch, and what sealing keeps in memory."""
SHARD_ROWS = 1 << 14
RANGE_IMAGES = 1 << 17
"""Hashes that are compared at a time."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to be written: rows ``[start, stop)`` of the store."""

    store: Path
    number: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """The shard."""
        return self.store / f"images-{self.number:05d}.arrow"

    @property
    def marker(self) -> Path:
        """Its done-marker: its entry in the index."""
        return _work(self.store) / f"images-{self.number:05d}.json"

    def is_done(self) -> bool:
        """Return whether the shard is whole. Its contents follow from the store's name."""
        return self.marker.is_file() and self.path.is_file()


def seal_store(units: Sequence[Unit], directory: Path, team: Team) -> Path:
    """Build ``directory/KEY`` from the units' images, unless it is there; return it.

    ``KEY`` names the contents, so packs that were made with another store keep theirs. The order of rows depends on the
    units' order only. The units' own copies are removed once the store is complete.

    Raises:
        UserError: the images of a unit are neither beside it nor in an earlier store.
    """
    store = directory / store_key(units)
    if team.serial(lambda: _is_sealed(units, store)):
        return store
    whole, jobs = team.serial(lambda: (_is_whole(store), _prepare(units, store)))
    team.map(_write_shard, [] if whole else to_write(jobs, team), _nothing)
    team.serial(lambda: _finish(units, store, jobs))
    return store


def to_write(jobs: Sequence[ShardJob], team: Team) -> list[ShardJob]:
    """Return the shards this member writes: what is done already differs from one member's look to the next one's."""
    return [job for job in team.share(jobs) if not job.is_done()]


def store_key(units: Sequence[Unit]) -> str:
    """Return the name of the store that holds exactly the units' images, in their order."""
    return hashlib.sha256("".join(unit.report().images_sha256 for unit in units).encode()).hexdigest()[:12]


def _nothing(_: object) -> None:
    pass


def _work(store: Path) -> Path:
    return store / ".work"


def _is_sealed(units: Sequence[Unit], store: Path) -> bool:
    return _is_whole(store) and not _work(store).is_dir() and all(unit.rows(store.name).is_file() for unit in units)


def _is_whole(store: Path) -> bool:
    try:
        return ImageStore(store).is_complete()
    except UserError:
        return False


def forget_damaged(directory: Path) -> None:
    """Remove the index of every store that misses a part, so that units which gave it their copies are read anew."""
    for index in directory.glob("*/store.json"):
        if not _is_whole(index.parent):
            index.unlink(missing_ok=True)


def _prepare(units: Sequence[Unit], store: Path) -> list[ShardJob]:
    """Find the row of every image and the bounds of the shards, and write down what workers need to know."""
    starts = np.cumsum([0, *(unit.report().images for unit in units)])
    with _new_rows(store, int(starts[-1])) as rows:
        _find_owners(units, starts, rows)
        first_rows, bounds = _number_rows(units, starts, rows)
    context = {
        "units": [[unit.corpus, unit.shard, str(unit.folder), unit.raw] for unit in units],
        "starts": starts.tolist(),
        "first_rows": first_rows,
    }
    write_atomic(_work(store) / "context.json", json.dumps(context).encode())
    return [ShardJob(store, number, *ends) for number, ends in enumerate(itertools.pairwise(bounds))]


def _rows(store: Path) -> Path:
    """Return the file with the store row of every image of every unit."""
    return _work(store) / "rows"


@contextmanager
def _new_rows(store: Path, count: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the mapped rows of ``count`` images, to be written; they become the file when the block ends well.

    Whoever has the file of an earlier attempt mapped keeps that one.
    """
    with atomic_path(_rows(store)) as temporary:
        allocate(temporary, 8 * count)
        rows = _map(temporary, count, "r+")
        yield rows
        if isinstance(rows, np.memmap):
            rows.flush()  # other nodes read the file


def allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes on the disk: writing to a mapped page that finds no room kills the process.

    Raises:
        UserError: there is no room.
    """
    try:
        with path.open("wb") as file:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UserError(f"{path.parent}: no room for {size:,} bytes ({error.strerror}): free some there") from error


def _map(path: Path, count: int, mode: Any) -> npt.NDArray[np.int64]:
    """Map ``count`` numbers; an empty file cannot be mapped."""
    return np.memmap(path, np.int64, mode, shape=(count,)) if count else np.empty(0, np.int64)


def _find_owners(units: Sequence[Unit], starts: npt.NDArray[np.int64], owners: npt.NDArray[np.int64]) -> None:
    """Write, for every image of every unit, the number of the first image with its content."""
    for first, stop in itertools.pairwise(_ranges(len(owners))):
        parts = [Digests.open(unit.digests).between(first, stop) for unit in units]
        numbers = np.concatenate([part.index + start for part, start in zip(parts, starts[:-1], strict=True)])
        sha256 = np.concatenate([part.sha256 for part in parts])
        _, uses, which = np.unique(sha256, return_index=True, return_inverse=True)
        owners[numbers] = numbers[uses][which]


def _ranges(images: int) -> list[bytes]:
    """Return the bounds of equal ranges of hashes with about ``RANGE_IMAGES`` images each; the outermost are open."""
    count = -(-images // RANGE_IMAGES)
    if count == 0:
        return []
    return [b"", *((number * (1 << 64) // count).to_bytes(8) for number in range(1, count)), b""]


def _number_rows(
    units: Sequence[Unit], starts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[list[int], list[int]]:
    """Turn owners into store rows, unit by unit; return each unit's first new row, and the bounds of the shards."""
    first_rows, bounds, row, held = [0], [0], 0, 0
    for unit, (start, stop) in zip(units, itertools.pairwise(starts.tolist()), strict=True):
        owners, numbers = rows[start:stop].copy(), np.arange(start, stop)
        new = owners == numbers
        rows[start:stop] = np.where(new, row + np.cumsum(new) - 1, rows[owners])
        digests = Digests.open(unit.digests)
        sizes = np.empty(stop - start, dtype=np.uint64)
        sizes[digests.index] = digests.size
        for size in sizes[new].tolist():
            row, held = row + 1, held + size
            if held >= SHARD_BYTES or row - bounds[-1] == SHARD_ROWS:
                bounds.append(row)
                held = 0
        first_rows.append(row)
    return first_rows, bounds if bounds[-1] == row else [*bounds, row]


@dataclass(frozen=True)
class _Context:
    """What a worker process keeps between the shards of one store."""

    units: list[Unit]
    starts: list[int]
    first_rows: npt.NDArray[np.int64]
    """First new row of each unit and, last, the number of rows."""
    rows: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=1)
def _context(store: Path) -> _Context:
    raw = json.loads((_work(store) / "context.json").read_text(encoding="utf-8"))
    units = [Unit(corpus, shard, Path(folder), files) for corpus, shard, folder, files in raw["units"]]
    rows = _map(_rows(store), raw["starts"][-1], "r")
    return _Context(units, raw["starts"], np.array(raw["first_rows"]), rows)


def _write_shard(job: ShardJob) -> None:
    """Copy the images of one shard from the units that use them first."""
    context = _context(job.store)
    first = int(np.searchsorted(context.first_rows, job.start, side="right")) - 1
    last = int(np.searchsorted(context.first_rows, job.stop))
    batches: list[pa.RecordBatch] = []
    for number in range(first, last):
        rows = context.rows[context.starts[number] : context.starts[number + 1]]
        low = max(job.start, int(context.first_rows[number]))  # lower rows are images of earlier units
        batches += _images(context.units[number], np.flatnonzero((rows >= low) & (rows < job.stop)), job.store.parent)
    (whole,) = pa.Table.from_batches(batches, schema=IMAGE_SCHEMA).combine_chunks().to_batches()
    with ArrowFile(job.path, IMAGE_SCHEMA) as file:
        file.write(whole)
    write_atomic(job.marker, json.dumps(asdict(file.entry)).encode())


def _images(unit: Unit, wanted: npt.NDArray[np.int64], stores: Path) -> Iterator[pa.RecordBatch]:
    """Yield the images with the given places in a unit, in their order."""
    if not len(wanted):
        return
    if not unit.images.is_file():
        yield _from_store(unit, wanted, stores)
        return
    start = 0
    for batch in open_batches(unit.images):
        inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
        if len(inside):
            yield batch.take(pa.array(inside))
        start += batch.num_rows


def _from_store(unit: Unit, wanted: npt.NDArray[np.int64], stores: Path) -> pa.RecordBatch:
    """Return images of a unit that gave its copies to a store sealed earlier, which it knows the rows of."""
    key = unit.sealed_in(stores)
    if key is None:
        unit.marker.unlink(missing_ok=True)
        raise UserError(
            f"{unit.corpus}/{unit.shard}: its images are in no store any more (was one deleted?); "
            "run ingest again to read them anew"
        )
    store, rows = ImageStore(stores / key), np.fromfile(unit.rows(key), dtype=np.int64)[wanted].tolist()
    found = [(bytes.fromhex(store.sha256(row)), *store.size(row), store.read(row)) for row in rows]
    columns = zip(*found, strict=True)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, IMAGE_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=IMAGE_SCHEMA)


def _finish(units: Sequence[Unit], store: Path, jobs: Sequence[ShardJob]) -> None:
    """Write the index, then each unit's rows, and only then remove what the store holds now."""
    if not _is_whole(store):
        shards = [json.loads(job.marker.read_text(encoding="utf-8")) for job in jobs]
        assert all(shard["rows"] == job.stop - job.start for shard, job in zip(shards, jobs, strict=True))
        index = {"format": STORE_FORMAT, "version": STORE_VERSION, "shards": shards}
        write_atomic(store / "store.json", json.dumps(index, indent=1, sort_keys=True).encode() + b"\n")
    context = _context(store)
    for number, unit in enumerate(units):
        rows = context.rows[context.starts[number] : context.starts[number + 1]]
        write_atomic(unit.rows(store.name), rows.tobytes())
    for unit in units:
        unit.images.unlink(missing_ok=True)
    _context.cache_clear()
    shutil.rmtree(_work(store))
