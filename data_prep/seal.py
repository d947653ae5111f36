"""Sealing the image store: the distinct images of all units, gathered in order of first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.arrow_files import ArrowWriter, open_batches
from data_prep.errors import UserError
from data_prep.images import IMAGE_SCHEMA, STORE_FORMAT, STORE_VERSION, ImageStore
from data_prep.packs import FileEntry, write_atomic
from data_prep.workspace import Unit

SHARD_BYTES = 64 << 20
"""A store shard is closed when it holds this much: it is one Arrow batch, and all that sealing keeps in memory."""
SHARD_ROWS = 1 << 14


def seal_store(units: Sequence[Unit], directory: Path) -> Path:
    """Build ``directory/KEY`` from the units' images, unless it is there; return it.

    ``KEY`` names the contents, so packs that were made with another store keep theirs. The order of rows depends on the
    units' order only. The units' own copies are removed once the store is complete.
    """
    digests = [np.fromfile(unit.digests, dtype="S32") for unit in units]
    merged = np.concatenate([*digests, np.empty(0, dtype="S32")])
    key = hashlib.sha256(merged.tobytes()).hexdigest()[:12]
    store = directory / key
    if (store / "store.json").is_file() and all(unit.rows(key).is_file() for unit in units):
        return store
    first, row_of = first_uses(merged)
    if not (store / "store.json").is_file():
        shards = _write_shards(units, digests, first, store)
        index = {"format": STORE_FORMAT, "version": STORE_VERSION, "shards": [asdict(entry) for entry in shards]}
        write_atomic(store / "store.json", json.dumps(index, indent=1, sort_keys=True).encode() + b"\n")
    ends = np.cumsum([len(part) for part in digests])
    for unit, part, end in zip(units, digests, ends, strict=True):
        write_atomic(unit.rows(key), row_of[end - len(part) : end].tobytes())
        unit.images.unlink(missing_ok=True)
    return store


def first_uses(digests: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return, for each digest, whether it is its first use, and the row of its content (rows in order of first use)."""
    _, index, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first = np.zeros(len(digests), dtype=bool)
    first[index] = True
    rank = np.empty(len(index), dtype=np.int64)
    rank[np.argsort(index)] = np.arange(len(index))
    return first, rank[inverse]


def _write_shards(
    units: Sequence[Unit], digests: Sequence[npt.NDArray[np.bytes_]], first: npt.NDArray[np.bool_], store: Path
) -> list[FileEntry]:
    entries: list[FileEntry] = []
    rows: list[tuple[bytes, int, int, bytes]] = []
    held = 0

    def close() -> None:
        nonlocal held
        with ArrowWriter(store / f"images-{len(entries):05d}.arrow", IMAGE_SCHEMA, batch_rows=SHARD_ROWS) as writer:
            for row in rows:
                writer.append(row)
        entries.append(writer.entry)
        rows.clear()
        held = 0

    for row in _distinct(units, digests, first, store.parent):
        rows.append(row)
        held += len(row[3])
        if held >= SHARD_BYTES or len(rows) == SHARD_ROWS:
            close()
    if rows:
        close()
    return entries


def _distinct(
    units: Sequence[Unit], digests: Sequence[npt.NDArray[np.bytes_]], first: npt.NDArray[np.bool_], stores: Path
) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Yield (sha256, width, height, bytes) of every distinct image at its first use."""
    earlier: dict[bytes, tuple[ImageStore, int]] | None = None
    start = 0
    for unit, part in zip(units, digests, strict=True):
        wanted = np.flatnonzero(first[start : start + len(part)])
        start += len(part)
        if unit.images.is_file():
            yield from _from_unit(unit, wanted)
            continue
        earlier = _index_stores(stores) if earlier is None and len(wanted) else earlier
        for sha256 in part[wanted]:
            yield _from_store(unit, bytes(sha256).ljust(32, b"\0"), earlier or {})


def _from_unit(unit: Unit, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[bytes, int, int, bytes]]:
    start = 0
    for batch in open_batches(unit.images):
        inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
        for row in batch.take(pa.array(inside)).to_pylist():
            yield row["sha256"], row["width"], row["height"], row["data"]
        start += batch.num_rows


def _index_stores(directory: Path) -> dict[bytes, tuple[ImageStore, int]]:
    """Return where each image lies in the stores sealed earlier, to which unchanged units gave their copies."""
    stores = [ImageStore(path.parent) for path in sorted(directory.glob("*/store.json"))]
    return {bytes.fromhex(store.sha256(row)): (store, row) for store in stores for row in range(len(store))}


def _from_store(
    unit: Unit, sha256: bytes, stores: dict[bytes, tuple[ImageStore, int]]
) -> tuple[bytes, int, int, bytes]:
    if sha256 not in stores:
        unit.marker.unlink(missing_ok=True)
        raise UserError(
            f"{unit.corpus}/{unit.shard}: image {sha256.hex()[:12]} is in no store any more (was one deleted?); "
            "run ingest again to read it anew"
        )
    store, row = stores[sha256]
    return sha256, *store.size(row), store.read(row)
