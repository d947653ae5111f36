"""Input bytes as a file, for readers that take a path."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mma-fuzz-")  # removed when the process ends


def as_file(data: bytes, name: str) -> Path:
    """Write an input to a file of this name in a folder of this process; each call replaces the one before."""
    path = Path(_folder().name) / f"of-{name}" / name  # a folder of its own: no other target's file beside it
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path
