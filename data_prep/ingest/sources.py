"""The image files that a unit of ingest read: the unit is stale when one of them changes.

A file is known by its size and its time, as make and rsync know it; contents are not read again. Images that were
missing are watched by their paths, and with them the image folders and the folders in them, for images that a reader
finds by other means: so images which arrive later are seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.ingest.workspace import ShardOutput

_AT_A_TIME = 16
"""Stats in flight: on a parallel file system each takes its time, and few cores are needed to wait."""


def describe(paths: Iterable[Path], root: Path) -> bytes:
    """Return what a unit keeps of the files it read: a line with size, time and place below ``root`` for each.

    A name that holds a line end has no line of its own, and is not watched.
    """
    places = (os.path.relpath(path, root) for path in sorted(set(paths)))
    return b"".join(_line(place, root) for place in places if "\n" not in place)


def watched(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield folders and the folders in them."""
    for folder in folders:
        yield folder
        yield from (Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())


def unchanged(outputs: Iterable[ShardOutput], root: Path) -> list[bool]:
    """Return whether all that each unit read is as it was."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(lambda output: _is_unchanged(output, root), outputs))


def _is_unchanged(output: ShardOutput, root: Path) -> bool:
    if not output.sources.is_file():
        return False
    with output.sources.open("rb") as lines:
        return all(_line(os.fsdecode(line.split(b" ", 2)[-1][:-1]), root) == line for line in lines)


def _line(place: str, root: Path) -> bytes:
    try:
        about = (root / place).stat()
    except (OSError, ValueError):
        return b"0 0 " + os.fsencode(place) + b"\n"
    return f"{about.st_size} {about.st_mtime_ns} ".encode() + os.fsencode(place) + b"\n"
