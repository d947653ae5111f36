"""Hashes of the distinct images of one shard output, sorted, so any range of hashes is one slice.

The file holds two arrays, one after the other: sha256 (32 bytes each, ascending) and index in the
shard output (uint32). Building the image store reads only the slices it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_WIDTHS = (32, 4)


@dataclass(frozen=True, slots=True)
class ImageHashes:
    """Arrays of one length, sorted by ``sha256``; views into the mapped file."""

    sha256: npt.NDArray[np.bytes_]
    """Raw hashes (``S32``)."""
    index: npt.NDArray[np.uint32]
    """Index among the distinct images of the shard output, in order of first use."""

    @classmethod
    def open(cls, path: Path) -> ImageHashes:
        """Map a file written by ``to_bytes``. Raises OSError."""
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        ends = np.cumsum(_WIDTHS) * (size // sum(_WIDTHS))
        sha256, index, _ = np.split(data, ends)
        return cls(sha256.view("S32"), index.view("<u4"))

    def between(self, first: bytes, stop: bytes) -> ImageHashes:
        """Return the images with ``first <= hash < stop``; an empty bound means no limit."""
        low = int(np.searchsorted(self.sha256, np.array(first, "S32"))) if first else 0
        high = int(np.searchsorted(self.sha256, np.array(stop, "S32"))) if stop else len(self.sha256)
        return ImageHashes(self.sha256[low:high], self.index[low:high])


def to_bytes(hashes: Iterable[bytes]) -> bytes:
    """Return the contents of the file, given raw sha256 hashes in order of first use."""
    sha256 = np.array(list(hashes), dtype="S32")
    order = np.argsort(sha256, kind="stable")
    return sha256[order].tobytes() + order.astype("<u4").tobytes()
