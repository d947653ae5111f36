"""Raw JSON files as sequences of rows.

Bytes are decoded with ``surrogateescape``: a byte that is not UTF-8 spoils its own row, not the whole file.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from data_prep.common.errors import UserError, one_line
from data_prep.corpora.base import Malformed

CHUNK_BYTES = 1 << 20
_BEFORE = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*")  # a byte order mark, as latin-1 reads it
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_COLON = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_DELIMITER = re.compile(r"[ \t\r\n]*[,\]}]")


def load_json(path: Path, keep: Collection[str] = ()) -> Any:
    """Return the content of a JSON file; with ``keep``, only these members of every object.

    Other members are dropped while the file is parsed, so they never fill memory. Raises UserError when the file is
    not JSON; the message names the file and the position.
    """

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {key: found[key] for key in keep if key in found}

    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return json.load(file, object_hook=kept if keep else None)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a JSON file ({one_line(problem)}); download it again") from None


def load_list(path: Path, key: str, keep: Collection[str] = ()) -> list[Any]:
    """Return the list under ``key`` of a JSON file's top-level object; with ``keep``, only these members of its rows.

    Raises UserError when there is no such list.
    """
    content = load_json(path, [key, *keep] if keep else ())
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an object with a list under '{key}'; is this the right file?")
    return rows


class Rows(Sequence[object], ABC):
    """Rows of raw data, read on demand one by one or by slice."""

    @abstractmethod
    def read(self, numbers: range) -> Iterator[object]:
        """Yield the rows with these numbers; a row that cannot be parsed is ``Malformed``."""

    def __iter__(self) -> Iterator[object]:
        return self.read(range(len(self)))

    @overload
    def __getitem__(self, number: int) -> object: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[object]: ...
    def __getitem__(self, number: int | slice) -> object:
        """Return one row, or the rows of a slice."""
        chosen = range(len(self))[number]
        return list(self.read(chosen)) if isinstance(chosen, range) else next(self.read(range(chosen, chosen + 1)))


class JsonRows(Rows):
    """Rows of a JSON file, parsed on demand from their byte ranges; the index takes 16 bytes per row."""

    def __init__(self, path: Path, spans: Iterator[tuple[int, int]], *, members: bool = False) -> None:
        """Index ``(start, size)`` in bytes of every row; with ``members``, rows are ``"key": value`` pairs."""
        self._path = path
        self._braces = ("{", "}") if members else ("", "")
        self._starts, self._sizes = array("q"), array("q")
        for start, size in spans:
            self._starts.append(start)
            self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, numbers: range) -> Iterator[object]:
        """Parse rows; a row that is not JSON is ``Malformed``."""
        with self._path.open("rb") as file:
            for number in numbers:
                file.seek(self._starts[number])
                yield self._parse(file.read(self._sizes[number]))

    def _parse(self, raw: bytes) -> object:
        before, after = self._braces
        try:
            return json.loads(before + raw.decode(errors="surrogateescape") + after)
        except (ValueError, RecursionError) as problem:
            return Malformed(str(problem))


def json_lines(path: Path) -> JsonRows:
    """Return the non-empty lines of a JSON-lines file as rows. Raises UserError when the file is UTF-16."""
    return JsonRows(path, _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    with path.open("rb") as file:
        opening = file.read(len(BOM_UTF8))
        if opening.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise UserError(f"{path}: UTF-16 text, but JSON is UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")
        start = len(BOM_UTF8) if opening == BOM_UTF8 else 0
        file.seek(start)
        for line in file:
            if line.strip():
                yield start, len(line)
            start += len(line)


def json_array(path: Path) -> JsonRows:
    """Return the elements of a JSON file's top-level list as rows; the file may be larger than memory.

    Raises:
        UserError: the top level is not a list, or the file is not JSON.
    """
    return JsonRows(path, _elements(path, (_DELIMITER,), "[]"))


def json_members(path: Path) -> JsonRows:
    """Return the members of a JSON file's top-level object as rows ``{key: value}``; the file may exceed memory.

    Raises:
        UserError: the top level is not an object, or the file is not JSON.
    """
    return JsonRows(path, _elements(path, (_COLON, _DELIMITER), "{}"), members=True)


def _elements(path: Path, followers: Sequence[re.Pattern[str]], brackets: str) -> Iterator[tuple[int, int]]:
    """Yield the byte range of each top-level element, holding little more than one element in memory.

    ``followers`` are the patterns that must follow each JSON value of an element: a colon after a key, a delimiter
    after a value.
    """
    opening, closing = brackets[0], brackets[1]
    decoder = json.JSONDecoder()
    # In latin-1 every byte is one character, so text offsets are file offsets; JSON punctuation is ASCII.
    with path.open(encoding="latin-1", newline="") as file:
        buffer, base = file.read(CHUNK_BYTES), 0
        at = len(_BEFORE.match(buffer)[0])  # type: ignore[index]  # matches the empty string too
        if not buffer.startswith(opening, at):
            what = "list" if opening == "[" else "object"
            hint = "JSON lines? name it .jsonl (type chat)" if buffer.startswith("{", at) else "is this the right file?"
            raise UserError(f"{path}: expected a JSON {what} at the top level; {hint}")
        at += 1
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer.startswith(closing, at):
                return
            end = _end_of_element(decoder, buffer, at, followers)
            if end is not None:
                yield base + at, end - at
                at = end
                continue
            more = file.read(max(CHUNK_BYTES, len(buffer) - at))
            if not more:
                raise UserError(f"{path}: not JSON, or cut short, from byte {base + at}; download it again")
            buffer, base, at = buffer[at:] + more, base + at, 0


def _end_of_element(
    decoder: json.JSONDecoder, buffer: str, at: int, followers: Sequence[re.Pattern[str]]
) -> int | None:
    """Return where the element at ``at`` ends, or None when it may extend beyond the buffer.

    An element is complete only when its follower is in the buffer: ``0.`` at the edge starts with a valid ``0``.
    """
    end = at
    for follower in followers:
        try:
            end = decoder.raw_decode(buffer, at)[1]
        except (ValueError, RecursionError):
            return None
        after = follower.match(buffer, end)
        if after is None:
            return None
        at = after.end()
    return end


class Concatenated(Rows):
    """Several tables as one; slices have no step."""

    def __init__(self, tables: Sequence[Rows]) -> None:
        self._tables = tables
        self._starts = list(accumulate((len(table) for table in tables), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, numbers: range) -> Iterator[object]:
        """Yield rows, table by table."""
        assert numbers.step == 1, "slices of a chain have no step"
        for table, first in zip(self._tables, self._starts, strict=False):
            inside = range(len(table))[max(0, numbers.start - first) : max(0, numbers.stop - first)]
            if inside:
                yield from table.read(inside)
