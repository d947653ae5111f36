"""Raw JSON on disk as sequences of rows.

Everything is decoded with ``surrogateescape``: a byte that is not UTF-8 spoils its own row, not the whole file.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from data_prep.corpora.base import Malformed
from data_prep.errors import UserError

CHUNK_BYTES = 1 << 20
_OPENING = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_DELIMITER = re.compile(r"[ \t\r\n]*[,\]]")


def load_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError naming the file and the place where it is not JSON."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return json.load(file)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a JSON file ({problem}); download it again") from None


def load_list(path: Path, key: str) -> list[Any]:
    """Return the list under ``key`` of a JSON file's top-level object. Raises UserError where there is none."""
    content = load_json(path)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an object with a list under '{key}'; is this the right file?")
    return rows


def load_dict(path: Path) -> dict[str, Any]:
    """Return a JSON file's top-level object. Raises UserError where it is anything else."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of samples by id; is this the right file?")
    return content


class Spans(Sequence[object]):
    """Rows that are read from their place in the file when asked for: memory is 16 bytes a row."""

    def __init__(self, path: Path, spans: Iterator[tuple[int, int]]) -> None:
        self._path = path
        self._starts, self._sizes = array("q"), array("q")
        for start, size in spans:
            self._starts.append(start)
            self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, number: int) -> object: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[object]: ...
    def __getitem__(self, number: int | slice) -> object:
        """Return the parsed row, or ``Malformed`` where it is not JSON."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        with self._path.open("rb") as file:
            file.seek(self._starts[number])
            raw = file.read(self._sizes[number])
        try:
            return json.loads(raw.decode(errors="surrogateescape"))
        except (ValueError, RecursionError) as problem:
            return Malformed(str(problem))


def json_lines(path: Path) -> Spans:
    """Return the non-empty lines of a JSON-lines file as rows."""
    return Spans(path, _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield start, len(line)
            start += len(line)


def json_array(path: Path) -> Spans:
    """Return the elements of a JSON file's top-level list as rows, however large the file is.

    Raises:
        UserError: the top level is not a list, or the file is not JSON.
    """
    return Spans(path, _elements(path))


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    """Find where each element of a top-level list lies, holding little more than one element in memory."""
    decoder = json.JSONDecoder()
    # In latin-1 a character is a byte, so offsets in the text are offsets in the file; JSON's own marks are ASCII.
    with path.open(encoding="latin-1", newline="") as file:
        buffer, base = file.read(CHUNK_BYTES), 0
        opening = _OPENING.match(buffer)
        if opening is None:
            raise UserError(f"{path}: expected a JSON list at the top level; is this the right file?")
        at = opening.end()
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # matches the empty string too
            if buffer.startswith("]", at):
                return
            end = _end_of_value(decoder, buffer, at)
            if end < len(buffer):
                yield base + at, end - at
                at = end
                continue
            more = file.read(max(CHUNK_BYTES, len(buffer) - at))
            if not more:
                raise UserError(f"{path}: not JSON, or cut short, from byte {base + at}; download it again")
            buffer, base, at = buffer[at:] + more, base + at, 0


def _end_of_value(decoder: json.JSONDecoder, buffer: str, at: int) -> int:
    """Return where the value at ``at`` ends, or the buffer's length where it may go on beyond."""
    try:
        end = decoder.raw_decode(buffer, at)[1]
    except (ValueError, RecursionError):
        return len(buffer)
    # A value is whole only when its delimiter is in sight: "0." at the buffer's edge begins with a complete "0".
    return end if _DELIMITER.match(buffer, end) else len(buffer)
