"""The image store rows of one shard output: int64 for each distinct image, then a sha256 over file name and rows.

The name is part of the hash, so the rows of another shard or store are not accepted either.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import REBUILD, write_atomic

_DIGEST_BYTES = 32


def write_store_rows(path: Path, rows: npt.NDArray[np.int64]) -> None:
    """Write int64[images] store rows with their hash."""
    data = rows.astype("<i8", copy=False).tobytes()
    write_atomic(path, data + _digest(path, data))


def read_store_rows(path: Path) -> npt.NDArray[np.int64]:
    """Return int64[images] store rows. Raises UserError if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); run mma-prep again") from error
    data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if len(data) % 8 or digest != _digest(path, data):
        raise UserError(f"{path}: differs from its own hash (damaged or edited); {REBUILD}")
    return np.frombuffer(data, "<i8")


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + data).digest()
