"""The image files that ingest read for one shard output, which is out of date when one of them changes.

A file is identified by size and modification time, as in make and rsync; contents are not read again. If images were
missing, their paths, the image folders and their subfolders are watched too, so images that arrive later are noticed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import Hashed
from data_prep.ingest.workspace import ShardOutput

_AT_A_TIME = 16
"""``stat`` calls in flight: on a parallel file system each one waits, and waiting needs few cores."""


def describe(paths: Iterable[Path], root: Path) -> bytes:
    """Return the list of files: one line each, with size, modification time and path relative to ``root``.

    A name that contains a line end is not listed and not watched.
    """
    places = (os.path.relpath(path, root) for path in sorted(set(paths)))
    return b"".join(_line(place, root) for place in places if "\n" not in place)


def watched(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield folders and their direct subfolders."""
    for folder in folders:
        yield folder
        yield from (Path(entry.path) for entry in os.scandir(folder) if _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def unchanged(outputs: Iterable[ShardOutput], root: Path) -> list[bool]:
    """Return, for each shard output, whether the files it read are unchanged."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(lambda output: _is_unchanged(output, root), outputs))


def _is_unchanged(output: ShardOutput, root: Path) -> bool:
    return changed_files(output, root) == []


def changed_files(output: ShardOutput, root: Path) -> list[str] | None:
    """Return the first file that changed since it was read, if any; None if the list is missing or damaged."""
    try:
        data = Hashed(output.sources, output.report().sources_sha256, output.marker.name).read()
    except (UserError, OSError):
        return None
    places = ((os.fsdecode(line.split(b" ", 2)[-1][:-1]), line) for line in io.BytesIO(data))
    return list(islice((place for place, line in places if _line(place, root) != line), 1))


def _line(place: str, root: Path) -> bytes:
    try:
        about = (root / place).stat()
    except (OSError, ValueError):
        return b"0 0 " + os.fsencode(place) + b"\n"
    return f"{about.st_size} {about.st_mtime_ns} ".encode() + os.fsencode(place) + b"\n"
