"""Rows of Parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpora import build_corpus
from data_prep.example import Example
from data_prep.quarantine import CODES
from tests.data_prep.raw import png
from tests.fuzz.files import as_file

DICTIONARY = (b"PAR1", b"messages", b"images", b"\x15\x04", b"\xff\xff\xff\xff\x0f", b"\x00\x00\x00\x00")
MESSAGES = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "This."}]


def run(data: bytes) -> None:
    """Read every conversation of a file."""
    path = as_file(data, "data.parquet")
    corpus = build_corpus("chat", {"data": path.name}, path.parent)
    for shard in corpus.shards()[:4]:
        for item in corpus.examples(shard):
            assert isinstance(item, Example) or item.code in CODES


def seeds() -> Iterator[bytes]:
    """Yield a plain and a compressed file."""
    rows = [{"messages": MESSAGES, "images": [{"bytes": png(n), "path": f"{n}.png"}], "n": n} for n in range(6)]
    for compression in ("none", "snappy", "zstd"):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), stream, compression=compression, row_group_size=4)
        yield stream.getvalue()
