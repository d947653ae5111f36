"""The distinct images of one unit by content, sorted, so that the images of any range of hashes are one slice.

The file holds three arrays one after the other: sha256 (32 bytes each, ascending), place in the unit (uint32) and
size in bytes (uint64). Sealing the image store reads no more of it than it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_WIDTHS = (32, 4, 8)


@dataclass(frozen=True, slots=True)
class Digests:
    """Arrays of one length, sorted by ``sha256``; views into the mapped file."""

    sha256: npt.NDArray[np.bytes_]
    """Raw hashes (``S32``)."""
    index: npt.NDArray[np.uint32]
    """Place among the unit's distinct images, in order of first use."""
    size: npt.NDArray[np.uint64]
    """Bytes of the encoded image."""

    @classmethod
    def open(cls, path: Path) -> Digests:
        """Map a file written from ``to_bytes``. Raises OSError."""
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        ends = np.cumsum(_WIDTHS) * (size // sum(_WIDTHS))
        sha256, index, sizes, _ = np.split(data, ends)
        return cls(sha256.view("S32"), index.view("<u4"), sizes.view("<u8"))

    def between(self, first: bytes, stop: bytes) -> Digests:
        """Return the images whose hash is at least ``first`` and below ``stop``; no bytes stand for no limit."""
        low = int(np.searchsorted(self.sha256, np.array(first, "S32"))) if first else 0
        high = int(np.searchsorted(self.sha256, np.array(stop, "S32"))) if stop else len(self.sha256)
        return Digests(self.sha256[low:high], self.index[low:high], self.size[low:high])


def to_bytes(sizes: Mapping[bytes, int]) -> bytes:
    """Return the file's contents from raw sha256 -> size in bytes, in order of first use."""
    sha256 = np.array(list(sizes), dtype="S32")
    order = np.argsort(sha256, kind="stable")
    size = np.fromiter(sizes.values(), dtype="<u8", count=len(sizes))
    return sha256[order].tobytes() + order.astype("<u4").tobytes() + size[order].tobytes()
