"""The manifest of a pack folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from data_prep.packs import FileEntry, Manifest
from tests.fuzz.files import as_file

DICTIONARY = (
    *(b"-1", b"1e400", b"9" * 5000, b"null", b"{}", b"[]", b'"\\ud800"', b"[" * 3000, b"../", b"true"),
    *(b"18446744073709551616", b'"seq_len": 0', b'"rows": 9007199254740993', b"NaN"),
)


def run(data: bytes) -> None:
    """Load a manifest; no file of hashes beside it hides its content."""
    path = as_file(data, "manifest.json")
    Manifest.load(path.parent)


def seeds() -> Iterator[bytes]:
    """Yield a small manifest."""
    entry = FileEntry("pack-00000.arrow", 1000, hashlib.sha256(b"").hexdigest(), 3)
    yield Manifest(
        seq_len=8, rows=3, targets=5, tokens=20, image_tokens=2, images=1, max_images=1, max_segment_tokens=8,
        vocab_size=32, pad_id=0, image_id=1, eos_ids=(2,), tokenizer="tokenizer", tokenizer_sha256=entry.sha256,
        template="plain", plan_sha256=entry.sha256, image_store="../../images/a", files=(entry,), recipe={"a": [1]},
    ).to_json().encode()  # fmt: skip
