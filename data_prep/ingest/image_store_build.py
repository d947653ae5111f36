"""Building the image store: the distinct images of all shard outputs, in order of first use.

Each store shard holds the images that one shard output is the first to use. If those are all of its images, its file
becomes the store shard by a hard link; otherwise the new images are copied. Hashes are compared range by range, so
memory does not grow with the corpus; only a mapped file grows, by 8 bytes per image of every shard output. Any process
may write any store shard.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.common.arrow_files import ArrowWriter, atomic_path, open_batches
from data_prep.common.errors import UserError
from data_prep.common.files import FileEntry, Hashed, is_of_size, read_hashed, with_hash, write_atomic
from data_prep.common.store_index import write_store_index
from data_prep.common.workers import Team
from data_prep.images.store import IMAGE_SCHEMA, SHARD_BATCH_ROWS, ImageStore
from data_prep.ingest.image_hashes import ImageHashes
from data_prep.ingest.store_rows import read_store_rows, write_store_rows
from data_prep.ingest.workspace import ShardOutput

RANGE_IMAGES = 1 << 17
"""Minimum number of hashes compared at a time."""
RANGE_SHARE = 1 << 6
"""Minimum number of hashes per shard output compared at a time: every shard output is opened once per range."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One store shard to write: rows ``[start, stop)``, the new images of one shard output."""

    store: Path
    number: int
    output: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """The store shard."""
        return self.store / f"images-{self.number:05d}.arrow"

    @property
    def marker(self) -> Path:
        """Its done-marker, which holds its entry of the index."""
        return _work(self.store) / f"images-{self.number:05d}.json"

    def is_done(self) -> bool:
        """Return whether the store shard is complete. The name of the store determines its contents."""
        entry = read_hashed(self.marker)
        return entry is not None and is_of_size(self.path, entry["bytes"])


def build_image_store(outputs: Sequence[ShardOutput], directory: Path, team: Team) -> Path:
    """Build ``directory/KEY`` from the images of the shard outputs unless it exists; return it.

    ``KEY`` is derived from the contents, so packs built with another store keep theirs. The order of rows depends only
    on the order of the shard outputs. Their own image files are removed once the store is complete.

    Raises:
        UserError: the images of a shard output are neither beside it nor in an earlier store.
    """
    store = directory / store_key(outputs)
    if team.serial(lambda: _is_built(outputs, store)):
        return store
    complete, jobs = team.serial(lambda: (_is_complete(store), _prepare(outputs, store)))
    team.map(_write_shard, [] if complete else shards_to_write(jobs, team), _ignore)
    team.serial(lambda: _finish(outputs, store, jobs))
    return store


def shards_to_write(jobs: Sequence[ShardJob], team: Team) -> list[ShardJob]:
    """Return the unfinished shards of this process. Divide first: processes may see different shards as done."""
    return [job for job in team.share(jobs) if not job.is_done()]


def store_key(outputs: Sequence[ShardOutput]) -> str:
    """Return the name of the store that holds exactly these images, in this order."""
    return hashlib.sha256("".join(output.report().images_sha256 for output in outputs).encode()).hexdigest()[:12]


def _ignore(_: object) -> None:
    pass


def _work(store: Path) -> Path:
    return store / ".work"


def _is_built(outputs: Sequence[ShardOutput], store: Path) -> bool:
    return (
        _is_complete(store)
        and not _work(store).is_dir()
        and all(output.rows(store.name).is_file() for output in outputs)
    )


def _is_complete(store: Path) -> bool:
    found = _try_open(store)
    return found is not None and not found.missing()


def _try_open(store: Path) -> ImageStore | None:
    try:
        return ImageStore(store)
    except UserError:
        return None


def forget_damaged(out: Path) -> list[Path]:
    """Invalidate shard outputs whose images a damaged store has lost, so ingest reads them again.

    Returns:
        The folders of the damaged stores.
    """
    damaged = []
    for index in sorted(out.glob("images/*/store.json")):
        store = _try_open(index.parent)
        missing = store.missing() if store is not None else []
        if store is None:
            index.unlink(missing_ok=True)
            index.with_suffix(".sha256").unlink(missing_ok=True)
        elif missing:
            _forget(out, store.directory.name, missing)
        if store is None or missing:
            damaged.append(index.parent)
    return damaged


def _forget(out: Path, store: str, missing: Sequence[tuple[int, int]]) -> None:
    bounds = np.array(missing).ravel()  # ascending: a row above an odd number of bounds is inside a missing range
    for path in out.glob(f"ingest/*/*/*.rows-{store}"):
        try:
            rows = read_store_rows(path)
        except UserError:  # damaged
            path.unlink(missing_ok=True)
            continue
        if (np.searchsorted(bounds, rows, side="right") % 2).any():
            path.unlink(missing_ok=True)


def _prepare(outputs: Sequence[ShardOutput], store: Path) -> list[ShardJob]:
    """Find the row of every image and the bounds of the shards, and write the context file for the workers."""
    starts = np.cumsum([0, *(output.report().images for output in outputs)])
    for output in outputs:
        Hashed(output.image_hashes, output.report().images_sha256, output.marker.name).check()
    with _new_rows(store, int(starts[-1])) as rows:
        _find_owners(outputs, starts, rows)
        bounds = _number_rows(starts, rows)
    context = {
        "shards": [[output.corpus, output.shard, str(output.folder), output.raw] for output in outputs],
        "starts": starts.tolist(),
    }
    write_atomic(_work(store) / "context.json", json.dumps(context).encode())
    new = [(output, *ends) for output, ends in enumerate(itertools.pairwise(bounds)) if ends[0] < ends[1]]
    return [ShardJob(store, number, *which) for number, which in enumerate(new)]


def _rows(store: Path) -> Path:
    """Return the file with the store row of every image of every shard output."""
    return _work(store) / "rows"


@contextmanager
def _new_rows(store: Path, count: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield a writable map of the rows of ``count`` images; it becomes the file if the block succeeds."""
    with atomic_path(_rows(store)) as temporary:
        allocate(temporary, 8 * count)
        rows = np.memmap(temporary, np.int64, "r+", shape=(count,)) if count else np.empty(0, np.int64)
        yield rows
        if isinstance(rows, np.memmap):
            rows.flush()  # other nodes read the file


def allocate(path: Path, size: int) -> None:
    """Create a file and reserve ``size`` bytes for it: writing to a mapped page on a full disk kills the process.

    Raises:
        UserError: the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot reserve {size:,} bytes ({error.strerror}): free disk space there"
        ) from error


def _find_owners(outputs: Sequence[ShardOutput], starts: npt.NDArray[np.int64], owners: npt.NDArray[np.int64]) -> None:
    """Write, for every image of every shard output, the number of the first image with the same content."""
    for first, stop in itertools.pairwise(_ranges(len(owners), len(outputs))):
        parts = [ImageHashes.open(output.image_hashes).between(first, stop) for output in outputs]
        numbers = np.concatenate([part.index + start for part, start in zip(parts, starts[:-1], strict=True)])
        sha256 = np.concatenate([part.sha256 for part in parts])
        _, uses, which = np.unique(sha256, return_index=True, return_inverse=True)
        owners[numbers] = numbers[uses][which]


def _ranges(images: int, outputs: int) -> list[bytes]:
    """Return the bounds of equal ranges of hashes, compared one range at a time; the outer bounds are open."""
    count = -(-images // max(RANGE_IMAGES, RANGE_SHARE * outputs))
    if count == 0:
        return []
    return [b"", *((number * (1 << 64) // count).to_bytes(8) for number in range(1, count)), b""]


def _number_rows(starts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[int]:
    """Turn owners into store rows in place; return the first new row of each shard output and, last, the row count."""
    bounds = [0]
    for start, stop in itertools.pairwise(starts.tolist()):
        owners = rows[start:stop].copy()
        new = owners == np.arange(start, stop)
        rows[start:stop] = np.where(new, bounds[-1] + np.cumsum(new) - 1, rows[owners])
        bounds.append(bounds[-1] + int(new.sum()))
    return bounds


@dataclass(frozen=True)
class _Context:
    """State a worker process keeps between the shards of one store."""

    outputs: list[ShardOutput]
    starts: list[int]
    rows: Path
    listed: dict[str, FileEntry]
    """Shards in the index of this store, if it was complete before."""

    def rows_of(self, output: int) -> npt.NDArray[np.int64]:
        """Read the store rows of one shard output. Not mapped: NFS cannot remove a folder that holds an open file."""
        start, stop = self.starts[output : output + 2]
        return np.fromfile(self.rows, np.int64, stop - start, offset=8 * start)


@functools.lru_cache(maxsize=1)
def _context(store: Path) -> _Context:
    raw = json.loads((_work(store) / "context.json").read_text(encoding="utf-8"))
    outputs = [ShardOutput(corpus, shard, Path(folder), files) for corpus, shard, folder, files in raw["shards"]]
    found = _try_open(store)
    listed = {entry.name: entry for entry in (found.shards if found else ())}
    return _Context(outputs, raw["starts"], _rows(store), listed)


def _write_shard(job: ShardJob) -> None:
    """Write one store shard, unless it still exists, and its marker."""
    entry = _context(job.store).listed.get(job.path.name)
    if entry is None or not is_of_size(job.path, entry.bytes):
        entry = _make_shard(job)
    write_atomic(job.marker, with_hash(asdict(entry)))


def _make_shard(job: ShardJob) -> FileEntry:
    context, stores = _context(job.store), job.store.parent
    output, rows = context.outputs[job.output], context.rows_of(job.output)
    wanted = np.flatnonzero((rows >= job.start) & (rows < job.stop))
    reusable = _reusable_file(output, stores) if len(wanted) == len(rows) else None
    if reusable is None:
        return _copy_images(_images(output, wanted, stores), job.path)
    with atomic_path(job.path) as temporary:
        link_or_copy(reusable[0], temporary)
    return replace(reusable[1], name=job.path.name)


def _reusable_file(output: ShardOutput, stores: Path) -> tuple[Path, FileEntry] | None:
    """Return a file with exactly the images of a shard output: its own or a shard of an earlier store; else None."""
    report = output.report()
    if output.images.is_file():
        return output.images, report.pixels
    key = output.store_of(stores)
    if key is None:
        return None
    store, rows = ImageStore(stores / key), read_store_rows(output.rows(key))
    shard = store.shard_of(int(rows[0]), int(rows[-1]) + 1) if (np.diff(rows) == 1).all() else None
    return (store.directory / shard.name, shard) if shard is not None else None


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _copy_images(images: Iterable[tuple[bytes, int, int, bytes]], path: Path) -> FileEntry:
    with ArrowWriter(path, IMAGE_SCHEMA, batch_rows=SHARD_BATCH_ROWS) as file:
        for image in images:
            file.append(image)
    return file.entry


def _images(
    output: ShardOutput, wanted: npt.NDArray[np.int64], stores: Path
) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Yield (sha256, width, height, bytes) of the images with the given indices in a shard output, in order."""
    if not output.images.is_file():
        yield from _from_store(output, wanted, stores)
        return
    Hashed(output.images, output.report().pixels.sha256, output.marker.name).check()
    start = 0
    for batch in open_batches(output.images):
        inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
        yield from zip(*(column.to_pylist() for column in batch.take(pa.array(inside)).columns), strict=True)
        start += batch.num_rows


def _from_store(
    output: ShardOutput, wanted: npt.NDArray[np.int64], stores: Path
) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Yield images of a shard output from an earlier store that holds them.

    Raises:
        UserError: no store holds them, or an image does not match its hash.
    """
    key = output.store_of(stores)
    if key is None:
        output.marker.unlink(missing_ok=True)
        raise UserError(
            f"{output.corpus}/{output.shard}: its images are in no image store any more (was one deleted?); "
            "run `mma-prep ingest` to read them again"
        )
    store = ImageStore(stores / key)
    for row in read_store_rows(output.rows(key))[wanted].tolist():
        sha256, data = bytes.fromhex(store.sha256(row)), store.read(row)
        if hashlib.sha256(data).digest() != sha256:
            raise UserError(f"{store.directory}: image {row} is damaged; `mma-prep verify` names the file")
        yield sha256, *store.size(row), data


def _finish(outputs: Sequence[ShardOutput], store: Path, jobs: Sequence[ShardJob]) -> None:
    """Write the index, then the rows of each shard output, then remove the image files that the store replaces."""
    if not _is_complete(store):
        shards = [FileEntry(**read_hashed(job.marker)) for job in jobs]
        assert all(shard.rows == job.stop - job.start for shard, job in zip(shards, jobs, strict=True))
        write_store_index(store, shards)
    context = _context(store)
    for number, output in enumerate(outputs):
        write_store_rows(output.rows(store.name), context.rows_of(number))
    for output in outputs:
        output.images.unlink(missing_ok=True)
    for path in store.glob(".*.tmp"):  # left by killed processes
        path.unlink(missing_ok=True)
    _context.cache_clear()
    shutil.rmtree(_work(store))
