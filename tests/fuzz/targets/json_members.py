"""The members of a JSON object, as GQA, OCR-VQA and ScienceQA are read."""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_prep.corpora.base import Malformed
from data_prep.corpora.json_files import json_members
from tests.fuzz.files import as_file

DICTIONARY = (b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\u0000", b"\n", b"null", b"\xef\xbb\xbf", b'{"a":' * 1000)
MEMBERS = {"1": {"question": 'a "b" \u00e9', "choices": ["x", "y"]}, "2": None, "": 3}


def run(data: bytes) -> None:
    """Read a file; one that ``json`` parses gives the members that ``json`` gives."""
    rows = list(json_members(as_file(data, "members.json")))
    try:
        plain = json.loads(data.decode("utf-8-sig", errors="surrogateescape"), object_pairs_hook=list)
    except (ValueError, RecursionError):
        return
    if not any(isinstance(row, Malformed) for row in rows):
        keys = [next(iter(row)) for row in rows if isinstance(row, dict)]
        assert keys == [key for key, _ in plain]


def seeds() -> Iterator[bytes]:
    """Yield one object, compact and indented, and two objects."""
    yield json.dumps(MEMBERS).encode()
    yield json.dumps(MEMBERS, indent=1, ensure_ascii=False).encode()
    yield (json.dumps(MEMBERS) + "\n" + json.dumps({"3": []})).encode()
