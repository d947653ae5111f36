"""JSON rows in any layout: nothing is lost, and every row that is read is one that the file contains."""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_prep.corpora.base import Malformed
from data_prep.corpora.json_files import json_array, json_lines, json_rows
from tests.fuzz.files import as_file

DICTIONARY = (
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b"null", b"1e999"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 3000),
)
ROWS = [{"id": 1, "conversations": [{"from": "human", "value": 'a "b" \u00e9'}]}, {"id": 2.5}, {"id": None}]


def run(data: bytes) -> None:
    """Read a file by each reader; a file that ``json`` parses gives the rows that ``json`` gives."""
    path = as_file(data, "rows.json")
    lines = list(json_lines(path))
    assert len(lines) <= data.count(b"\n") + 1
    rows = list(json_rows(path))
    try:
        plain = json.loads(data.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        plain = None
    if isinstance(plain, list) and not any(isinstance(row, Malformed) for row in rows):
        assert json.dumps(rows) == json.dumps(plain)  # texts: NaN differs from itself
        assert json.dumps(list(json_array(path))) == json.dumps(plain)


def seeds() -> Iterator[bytes]:
    """Yield each layout."""
    yield json.dumps(ROWS).encode()
    yield json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    yield (json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:])).encode()
    yield "\n".join(map(json.dumps, ROWS)).encode()
    yield "".join(json.dumps(row, indent=2) for row in ROWS).encode()
