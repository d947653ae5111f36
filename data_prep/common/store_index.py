"""The index of an image store: ``store.json``, its shards with their hashes, and ``store.sha256`` beside it.

Packs and the store both read it; the images themselves belong to ``data_prep.images``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from data_prep.common.errors import UserError
from data_prep.common.files import RERUN, FileEntry, check_format, check_sums, sha256_line, write_atomic
from data_prep.common.typed_json import check_typed, parse_object, read_bytes

INDEX_FILE = "store.json"
STORE_FORMAT, STORE_VERSION = "mma-images", 2


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """The shards of an image store, in row order."""

    shards: tuple[FileEntry, ...]
    sha256: str
    """Hash of the index file: the identity of the store."""

    @property
    def rows(self) -> int:
        """Number of images."""
        return sum(shard.rows for shard in self.shards)

    @classmethod
    def load(cls, directory: Path) -> StoreIndex:
        """Read the index of a store folder. Raises UserError if it is missing, foreign, damaged or malformed."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise UserError(f"{directory}: no image store here ({INDEX_FILE} is missing); {RERUN}")
        data = read_bytes(path, RERUN)
        sha256 = hashlib.sha256(data).hexdigest()
        check_sums(path, sha256)
        raw = parse_object(data, path, RERUN)
        check_format(path, raw, format=STORE_FORMAT, version=STORE_VERSION, fix=RERUN)
        if raw.keys() != {"format", "version", "shards"}:
            raise UserError(f"{path}: malformed (its keys are not those of an image store index); {RERUN}")
        return cls(check_typed(_shards_type(), raw["shards"], path, RERUN), sha256)


def write_store_index(directory: Path, shards: Sequence[FileEntry]) -> None:
    """Write the index of a store folder, its hash first."""
    index = {"format": STORE_FORMAT, "version": STORE_VERSION, "shards": [asdict(shard) for shard in shards]}
    data, path = json.dumps(index, indent=1, sort_keys=True).encode() + b"\n", directory / INDEX_FILE
    write_atomic(path.with_suffix(".sha256"), sha256_line(hashlib.sha256(data).hexdigest(), path.name))
    write_atomic(path, data)


@functools.cache
def _shards_type() -> TypeAdapter[tuple[FileEntry, ...]]:
    return TypeAdapter(tuple[FileEntry, ...])
