"""Atomic writes and file hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from data_prep.common.errors import UserError, short_repr
from data_prep.common.typed_json import STRICT, Count, InnerPath, Sha256

RERUN = "run mma-prep again"
REBUILD = "delete it and run mma-prep again"  # a step checks only the existence and size of most files


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a folder: relative path, size in bytes, sha256 and, for row files, the row count."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: InnerPath
    bytes: Count
    sha256: Sha256
    rows: Count = 0


def sha256_line(sha256: str, name: str) -> bytes:
    """Return a file's line in the format of ``sha256sum``."""
    return f"{sha256}  {name}\n".encode()


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the path is no regular file (a device or FIFO could block, or never end), or has more than ``limit``
            bytes (``errno.EFBIG``).
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())  # what was opened, should the path have changed
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(min(about.st_size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return data


def is_of_size(path: Path, size: int) -> bool:
    """Return whether the file exists and has ``size`` bytes."""
    try:
        return path.stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False


def temporary_beside(path: Path) -> Path:
    """Return a temporary path in the folder of ``path``, unique across processes and hosts; make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: temporary file, fsync, rename."""
    temporary = temporary_beside(path)
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def with_hash(value: Any) -> bytes:
    """Serialize a JSON-able value together with its hash, as the content of a file."""
    return json.dumps({"value": value, "sha256": hash_json(value)}).encode() + b"\n"


def read_hashed(path: Path) -> Any:
    """Return the value of a file written with ``with_hash``, or None if the file is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return raw["value"] if raw["sha256"] == hash_json(raw["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_sums(path: Path, sha256: str, *, required: bool = False) -> None:
    """Check the sha256 of a file against the ``.sha256`` file beside it.

    Raises:
        UserError: they differ, or there is no such file although it is ``required``.
    """
    sums = path.with_suffix(".sha256")
    try:
        line = sums.read_bytes()
    except OSError as error:
        if required:
            raise UserError(f"{sums}: missing; {RERUN}") from error
        return
    if line != sha256_line(sha256, path.name):
        raise UserError(f"{path}: differs from {sums.name} (damaged or edited); {RERUN}")


def check_format(path: Path, raw: Mapping[str, Any], *, format: str, version: int, fix: str) -> None:
    """Raise UserError, naming both versions and the fix, if a file has another format or version."""
    if raw.get("format") != format:
        raise UserError(f"{path}: not a file of format {format}; {fix}")
    if raw.get("version") != version:
        found = short_repr(raw.get("version"))
        raise UserError(f"{path}: {format} version {found}, this release reads version {version}; {fix}")


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Hashed:
    """A file and its expected hash."""

    path: Path
    sha256: str
    listing: str
    """The file that lists it."""

    def check(self) -> None:
        """Raise UserError if the file is missing or altered."""
        if not self.path.is_file():
            raise UserError(f"{self.path}: listed in {self.listing} but missing; {RERUN}")
        if sha256_file(self.path) != self.sha256:
            raise self._differs()

    def read(self) -> bytes:
        """Return the content. Raises UserError when the file is missing or altered."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: listed in {self.listing} but missing; {RERUN}") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise self._differs()
        return data

    def _differs(self) -> UserError:
        return UserError(f"{self.path}: differs from {self.listing} (damaged or edited); {REBUILD}")
