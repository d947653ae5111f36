"""JSON files as sequences of rows, whatever their layout and size.

Only the byte range of every row is kept. A row is parsed when it is needed, so a row that is not JSON spoils itself
alone; what cannot be assigned to a row is an error that names its byte. Nothing in a file is ignored.
"""

from __future__ import annotations

import json
import re
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from data_prep.common.errors import UserError
from data_prep.corpora.base import Malformed
from data_prep.corpora.tables import Rows

CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 26
"""Largest row, 64 MiB: a damaged file that never ends a row must not fill the memory."""
_SNIFFED_LINES = 16
_SPACE = re.compile(r"(?:[ \t\r\n]|\xef\xbb\xbf)*")  # with byte order marks, as latin-1 reads them
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_COLON = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_DELIMITER = re.compile(r"[ \t\r\n]*[,\]}]")
_NOTHING = re.compile(r"")
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""Whole strings, an unterminated string's quote, and the characters that delimit JSON values."""
_PAIRS = {"]": "[", "}": "{"}


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
        """Parse rows; a row that is not JSON, or is larger than ``MAX_ROW_BYTES``, is ``Malformed``."""
        with self._path.open("rb") as file:
            for number in numbers:
                file.seek(self._starts[number])
                size = self._sizes[number]
                yield self._parse(file.read(size)) if size <= MAX_ROW_BYTES else _too_large(size)

    def _parse(self, raw: bytes) -> object:
        before, after = self._braces
        try:
            return json.loads(before + raw.decode(errors="surrogateescape") + after)
        except (ValueError, RecursionError) as problem:
            return Malformed(str(problem))


def _too_large(size: int) -> Malformed:
    return Malformed(f"a row of {size:,} bytes; the limit is {MAX_ROW_BYTES:,}", code="too-large")


def json_rows(path: Path) -> JsonRows:
    """Return the rows of a JSON file in any layout: a list, several lists, JSON lines, or one object after another.

    Raises:
        UserError: the file is UTF-16, holds a single object in a ``.json`` file, or contains bytes of no row.
    """
    with path.open("rb") as file:
        opening = _opening(file, path)
        if opening == b"[":
            return json_array(path)
        if opening == b"{" and not any(map(_is_object, islice(_bounded_lines(file), _SNIFFED_LINES))):
            rows = JsonRows(path, _objects(path))
        elif opening != b"{" and path.suffix == ".json":
            raise UserError(f"{path}: expected a JSON list or JSON lines; is this the right file?")
        else:
            rows = json_lines(path)
    if len(rows) == 1 and path.suffix == ".json":
        raise UserError(f"{path}: expected a JSON list or JSON lines, found a single object; is this the right file?")
    return rows


def _opening(file: BinaryIO, path: Path) -> bytes:
    """Return the first character that is not white space; the file is then at it. Raises UserError for UTF-16."""
    start = file.read(4096)
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise UserError(f"{path}: UTF-16 text, but JSON is UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")
    text = start.removeprefix(BOM_UTF8)
    at = len(start) - len(text.lstrip(b" \t\r\n"))
    file.seek(at)
    return start[at : at + 1]


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.readline(MAX_ROW_BYTES), b"")


def _is_object(line: bytes) -> bool:
    """Return whether a line is one whole JSON object, not indented: the file then has one per line."""
    try:
        return line.startswith(b"{") and isinstance(json.loads(line.decode(errors="surrogateescape")), dict)
    except (ValueError, RecursionError):
        return False


def json_lines(path: Path) -> JsonRows:
    """Return the non-empty lines of a JSON-lines file as rows. Raises UserError when the file is UTF-16."""
    return JsonRows(path, _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    with path.open("rb") as file:
        _opening(file, path)
        file.seek(0)
        start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(start)
        size, blank = 0, True
        while piece := file.readline(CHUNK_BYTES):  # in bounded pieces: a file may be one endless line
            size += len(piece)
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                if not blank:
                    yield start, size
                start, size, blank = start + size, 0, True
        if not blank:
            yield start, size


def json_array(path: Path) -> JsonRows:
    """Return the elements of a JSON file's top-level list, or lists, as rows; the file may exceed memory.

    An element that is not JSON is a ``Malformed`` row, as long as its brackets and quotes match.

    Raises:
        UserError: the top level is not a list, the file is cut short, or bytes belong to no element.
    """
    return JsonRows(path, _elements(path, (_DELIMITER,), "[]"))


def json_members(path: Path) -> JsonRows:
    """Return the members of a JSON file's top-level object, or objects, as rows ``{key: value}``.

    A member that is not JSON is a ``Malformed`` row, as long as its brackets and quotes match.

    Raises:
        UserError: the top level is not an object, the file is cut short, or bytes belong to no member.
    """
    return JsonRows(path, _elements(path, (_COLON, _DELIMITER), "{}"), members=True)


class _Window:
    """The part of a file that a scan needs, with a position in it.

    In latin-1 every byte is one character, so text offsets are file offsets; JSON punctuation is ASCII.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")
        self.text, self.base, self.at = "", 0, 0

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()

    @property
    def byte(self) -> int:
        """Offset of the position in the file."""
        return self.base + self.at

    def extend(self) -> bool:
        """Drop what lies before the position and read on; double what is kept. Returns False at the end of file."""
        kept = len(self.text) - self.at
        if kept > MAX_ROW_BYTES:
            raise UserError(
                f"{self._path}: the row at byte {self.byte} exceeds {MAX_ROW_BYTES:,} bytes, or its quotes or brackets "
                "do not match"
            )
        more = self._file.read(max(CHUNK_BYTES, kept))
        self.text, self.base, self.at = self.text[self.at :] + more.decode("latin-1"), self.byte, 0
        return bool(more)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Move behind what a pattern of single characters matches. Returns False at the end of file."""
        while True:
            self.at = pattern.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches "" too
            if len(self.text) - self.at > 2:  # three bytes may be a byte order mark
                return True
            if not self.extend():
                self.at = pattern.match(self.text, self.at).end()  # type: ignore[union-attr]
                return self.at < len(self.text)


def _elements(path: Path, followers: Sequence[re.Pattern[str]], brackets: str) -> Iterator[tuple[int, int]]:
    """Yield the byte range of each element of the top-level containers, holding little more than one in memory.

    ``followers`` are the patterns that must follow each JSON value of an element: a colon after a key, a delimiter
    after a value.
    """
    what = "list" if brackets == "[]" else "object"
    with _Window(path) as window:
        if not window.skip(_SPACE) or window.text[window.at] != brackets[0]:
            raise UserError(f"{path}: expected a JSON {what} at the top level; is this the right file?")
        while window.skip(_SPACE):
            if window.text[window.at] != brackets[0]:
                raise UserError(
                    f"{path}: unexpected data after the {what}, at byte {window.byte}; remove it or download the file "
                    "again"
                )
            window.at += 1
            yield from _inside(path, window, followers, brackets[1])


def _inside(
    path: Path, window: _Window, followers: Sequence[re.Pattern[str]], closing: str
) -> Iterator[tuple[int, int]]:
    """Yield the elements of one container, and move behind its end."""
    while True:
        if window.skip(_BETWEEN) and window.text[window.at] == closing:
            window.at += 1
            return
        size = _size_of_value(path, window, followers)
        yield window.byte, size
        window.at += size


def _objects(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the byte range of each top-level object of a file that holds one after another."""
    with _Window(path) as window:
        while window.skip(_SPACE):
            if window.text[window.at] != "{":
                raise UserError(f"{path}: expected a JSON object at byte {window.byte}; is the file damaged?")
            size = _size_of_value(path, window, (_NOTHING,))
            yield window.byte, size
            window.at += size


def _size_of_value(path: Path, window: _Window, followers: Sequence[re.Pattern[str]]) -> int:
    """Return the size of the element at the position, reading on as needed. Raises UserError when it has no end."""
    while True:
        end = _end_of_json(window.text, window.at, followers)
        if end is None:
            end = _end_by_brackets(window.text, window.at, alone=followers == (_NOTHING,))
        if end is not None and end > window.at:
            return end - window.at
        if end is not None or not window.extend():
            raise UserError(f"{path}: not JSON, or cut short, from byte {window.byte}; download it again")


_DECODER = json.JSONDecoder()


def _end_of_json(text: str, at: int, followers: Sequence[re.Pattern[str]]) -> int | None:
    """Return where the element at ``at`` ends, or None when it is no JSON or may extend beyond the text.

    An element is complete only when its follower is in the text: ``0.`` at the edge starts with a valid ``0``.
    """
    end = at
    for follower in followers:
        try:
            end = _DECODER.raw_decode(text, at)[1]
        except (ValueError, RecursionError):
            return None
        after = follower.match(text, end)
        if after is None:
            return None
        at = after.end()
    return end


def _end_by_brackets(text: str, at: int, *, alone: bool) -> int | None:
    """Return where an element ends by its strings and brackets alone, or None when it may extend beyond the text.

    Returns ``at`` when the brackets do not match: what follows cannot be assigned to any element. An element that
    stands ``alone`` ends with its closing bracket, any other one before the delimiter of its container.
    """
    open_brackets = bytearray()
    for found in _STRUCTURE.finditer(text, at):
        mark = found[0]
        if mark == '"':
            return None  # an unterminated string
        if mark in "[{":
            open_brackets += mark.encode()
        elif mark in "]}" and open_brackets:
            if chr(open_brackets.pop()) != _PAIRS[mark]:
                return at
            if alone and not open_brackets:
                return found.end()
        elif mark in ",]}" and not open_brackets:
            return found.start()
    return None
