"""Webdataset tars, plain and compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator

from data_prep.corpora import build_corpus
from data_prep.example import Example
from data_prep.quarantine import CODES
from tests.data_prep.raw import png
from tests.fuzz.files import as_file

DICTIONARY = (
    *(b"ustar\000", b"ustar  \0", b"0000644\0", b".jpg", b".txt", b".json", b"../", b"/etc/passwd"),
    *(b"15 path=a.jpg\n", b"20 GNU.sparse.map=0,1\n", b"11 size=-1\n", b"\x80" + bytes(10), b"\xff" * 12),
    *(kind + bytes(100) + b"ustar" for kind in (b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S")),
)


def run(data: bytes) -> None:
    """Read every sample of a tar."""
    corpus = build_corpus("webdataset", {}, as_file(data, "00000.tar").parent)
    for shard in corpus.shards():
        for item in corpus.examples(shard):
            assert isinstance(item, Example) or item.code in CODES


def seeds() -> Iterator[bytes]:
    """Yield small tars of each format and compression."""
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = _tar(kind)
        yield whole
    yield gzip.compress(whole, mtime=0)
    yield bz2.compress(whole)
    yield lzma.compress(whole)


def _tar(kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        long = "k" * (90 if kind == tarfile.USTAR_FORMAT else 120)
        members = {"1.png": png(1), "1.txt": b"one", f"{long}.jpg": png(2), f"{long}.json": b'{"caption": "two"}'}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()
