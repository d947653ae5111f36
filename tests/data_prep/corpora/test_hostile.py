"""Hostile raw files: what they claim never allocates, blocks or crashes.

Each reader runs in a process of its own with little address space; without the bounds it would need tebibytes or never
end.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.common.files import read_bounded
from data_prep.corpora import build_corpus
from data_prep.corpora.tars import MAX_HEADER_BYTES
from data_prep.corpora.webdataset import MAX_TEXT_BYTES, read_image
from data_prep.example import Example, ImageRef, Reject
from data_prep.show.rejects import Rejected
from tests.data_prep.corpora.test_corpora import outcomes
from tests.data_prep.raw import make_recipe, png, prepare, write_tar

SCRIPT = """
import json, resource, sys
from pathlib import Path
from data_prep.common.errors import UserError
from data_prep.corpora import build_corpus
kind, options, root, space = sys.argv[1:]
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(space),) * 2)
try:
    corpus = build_corpus(kind, json.loads(options), Path(root))
    items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
    print(json.dumps([getattr(item, "code", "kept") for item in items]))
except UserError as problem:
    print(json.dumps(str(problem)))
"""


def read_in_little_space(kind: str, root: Path, space: int, **options: str) -> list[str] | str:
    """Codes of the samples ("kept" for an example), or the message of a UserError."""
    command = [sys.executable, "-c", SCRIPT, kind, json.dumps(options), str(root), str(space)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    found: list[str] | str = json.loads(ended.stdout)
    return found


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def block(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def sample(key: str) -> bytes:
    image, text = png(1), b"a caption"
    return b"".join(
        [block(header(f"{key}.png", len(image))), padded(image), block(header(f"{key}.txt", len(text))), padded(text)]
    )


def sparse() -> bytes:
    """A GNU sparse image of 2 TiB: old format, one byte of data."""
    head = bytearray(block(header("big.png", 1, tarfile.GNUTYPE_SPARSE)))
    head[386:410] = b"%011o\0%011o\0" % (0, 1)
    head[483:495] = b"\x80" + (2 << 40).to_bytes(11)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + padded(b"x") + sample("b")


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        size = next(n for n in range(len(body), len(body) + 9) if len(str(n)) + len(body) == n)
        lines += str(size).encode() + body
    return block(header("pax", len(lines), kind)) + padded(lines)


def pax_sparse() -> bytes:
    """A GNU sparse image of 2 TiB: format 1.0."""
    about = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "big.png"}
    data = padded(b"1\n0\n1\n") + padded(b"x")
    return pax(about | {"GNU.sparse.realsize": str(2 << 40)}) + block(header("big.png", len(data))) + data + sample("b")


def quadratic_pax() -> bytes:
    """Records that overlap: tarfile of Python 3.11 would keep half a million keys of half a mebibyte."""
    lines = b"2 " * ((MAX_HEADER_BYTES - 8) // 2) + b"k=v\n"
    return block(header("pax", len(lines), tarfile.XHDTYPE)) + padded(lines) + sample("b")


def compressed(*parts: bytes | tuple[int, bytes]) -> bytes:
    """A gzip stream; ``(count, data)`` stands for data many times over, which is compressed once."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    out, crc, size = b"\x1f\x8b\x08\0\0\0\0\0\0\xff", 0, 0
    for count, data in (part if isinstance(part, tuple) else (1, part) for part in parts):
        once = stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)
        out += once + (stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)) * (count - 1) if count > 1 else once
        for _ in range(count):
            crc, size = zlib.crc32(data, crc), size + len(data)
    return out + stream.flush() + struct.pack("<II", crc, size % (1 << 32))


ZEROS = bytes(32 << 20)
TARS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "sparse": (sparse, ["unsafe-path", "kept"]),
    "pax sparse": (pax_sparse, ["unsafe-path", "kept"]),
    "endless sparse map": (lambda: sparse()[:482] + b"\1" + sparse()[483:512] + (bytes(504) + b"\1" * 8) * 5000, []),
    "quadratic pax header": (quadratic_pax, []),
    "chain of long names": (lambda: block(header("x", 0, tarfile.GNUTYPE_LONGNAME)) * 5000 + sample("b"), []),
    "large image in gz": (
        lambda: compressed(block(header("big.png", 9 * len(ZEROS))), (9, ZEROS), sample("b") + bytes(1024)),
        ["too-large", "kept"],
    ),
    "large pax header in gz": (
        lambda: compressed(block(header("pax", 9 * len(ZEROS), tarfile.XHDTYPE)), (9, ZEROS), sample("b")),
        [],
    ),
    "large text": (
        lambda: block(header("a.txt", MAX_TEXT_BYTES + 1)) + padded(bytes(MAX_TEXT_BYTES + 1)) + sample("b"),
        ["too-large", "kept"],
    ),
    "xz": (lambda: b"\xfd7zXZ\0\0\4" + bytes(1 << 16), []),
}


@pytest.mark.parametrize("case", TARS)
def test_a_tar_never_takes_the_memory_it_claims(case: str, tmp_path: Path) -> None:
    make, codes = TARS[case]
    (tmp_path / "00000.tar").write_bytes(make())
    assert read_in_little_space("webdataset", tmp_path, 256 << 20) == (codes or ["damaged-tar"])


def test_pax_names_and_sizes_are_still_read(tmp_path: Path) -> None:
    name, image = f"{'d' * 90}/{'k' * 120}", png(3)
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        for suffix, data in (("png", image), ("txt", "caf\u00e9".encode())):
            tar.addfile(header(f"{name}\u00e9.{suffix}", len(data)), io.BytesIO(data))
    [item] = outcomes(build_corpus("webdataset", {}, tmp_path))
    assert isinstance(item, Example) and item.id == f"00000/{name}\u00e9" and item.images[0].read() == image


JSON_FILES = {
    "endless row": ('[{"a": "', 90 << 20, "exceeds 67,108,864 bytes"),
    "deep nesting": ("[" * 1_000_000, 0, "cut short"),
    "endless number": ("[1", 0, "cut short"),
}


@pytest.mark.parametrize("case", JSON_FILES)
def test_a_json_file_without_an_end_is_refused_in_bounded_memory(case: str, tmp_path: Path) -> None:
    start, size, message = JSON_FILES[case]
    with (tmp_path / "data.json").open("w") as file:
        file.write(start)
        for _ in range(size >> 20):
            file.write("x" * (1 << 20))
    found = read_in_little_space("chat", tmp_path, 512 << 20, data="data.json")
    assert isinstance(found, str) and message in found


def test_a_file_that_claims_more_rows_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    rows, claimed = 77_777, 1 << 40
    batch = pa.record_batch({"messages": pa.nulls(rows)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(rows.to_bytes(8, "little"), claimed.to_bytes(8, "little")))
    found = read_in_little_space("chat", tmp_path, 512 << 20, data="a.arrow")
    assert isinstance(found, str) and f"claims {claimed:,} rows" in found


def odd_column(kind: str) -> pa.Array:
    return {
        "duration": pa.array([1, 2], pa.duration("ns")),
        "date": pa.array([2**50, 0], pa.timestamp("s")),
        "date64": pa.array([2**60, 0], pa.date64()),
        "map": pa.array([[("a", 1)], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
        "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        "decimal": pa.array([1, None], pa.decimal256(70, 2)),
        "dictionary": pa.array(["x", None]).dictionary_encode(),
        "latin-1": pa.array([b"caf\xe9", b"\xff"], pa.binary()).view(pa.string()),
        "half": pa.array([1.5, None], pa.float16()),
        "union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
    }[kind]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "kind", ["duration", "date", "date64", "map", "interval", "decimal", "dictionary", "latin-1", "half", "union"]
)
def test_odd_arrow_types_become_rejects_or_one_line(kind: str, suffix: str, tmp_path: Path) -> None:
    table = pa.table({"caption": odd_column(kind), "image": pa.array([png(1)] * 2)})
    try:
        if suffix == "parquet":
            pq.write_table(table, tmp_path / "a.parquet")
        else:
            with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow writes no {kind} to {suffix}")
    items = outcomes(build_corpus("captions", {"data": f"a.{suffix}", "names": "bytes"}, tmp_path))
    kept = [item for item in items if isinstance(item, Example)]
    assert {item.code for item in items if isinstance(item, Reject)} <= {"bad-row", "bad-encoding", "missing-key"}
    assert len(items) == 2 and len(kept) == (kind in ("dictionary", "union"))
    for item in items:
        json.dumps(item.raw if isinstance(item, Reject) else item.id)


def test_devices_pipes_and_loops_are_no_images(tmp_path: Path) -> None:
    """Through the whole ingest: they would block, or never end, or lead a folder listing in circles."""
    raw = tmp_path / "raw"
    images = raw / "images"
    images.mkdir(parents=True)
    (images / "ok.png").write_bytes(png(1))
    (images / "zero.png").symlink_to("/dev/zero")
    (images / "self.png").symlink_to("self.png")
    (images / "circle").symlink_to(".")
    os.mkfifo(images / "pipe.png")
    with (images / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    names = ["ok", "zero", "self", "pipe", "huge", "circle/circle/ok"]
    shown = [f"https://example.org/{name}.png" for name in ("ok", "zero", "pipe", "huge", "self")]
    document = {"images": [*shown, None], "texts": [None] * len(shown) + ["five images"]}
    (raw / "docs.jsonl").write_text(json.dumps(document) + "\n")
    rows = [{"caption": name, "path": f"{name}.png"} for name in names]
    (raw / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = {
        "docs": {"type": "interleaved", "data": "docs.jsonl"},
        "rows": {"type": "captions", "data": "rows.jsonl", "names": "path"},
    }
    packs = {"pt": {"corpora": ["docs", "rows"], "template": "caption", "seq_len": 64, "epochs": 1}}
    prepare(make_recipe(tmp_path, corpora=corpora, packs=packs, max_bad_fraction=0.9))
    found = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    codes = {(one["corpus"], one["sample"]): one["code"] for one in found}
    assert codes == {
        ("rows", "row-1"): "missing-image",
        ("rows", "row-2"): "missing-image",
        ("rows", "row-3"): "missing-image",
        ("rows", "row-4"): "too-large",
    }


def test_a_foreign_list_of_rejects_opens_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    write_tar(tmp_path / "a.tar", {"1": (png(1), "one")})
    about = {"corpus": "c", "shard": "s", "sample": "1", "code": "too-long", "detail": ""}
    for path in ("/dev/zero", str(tmp_path / "pipe.tar")):
        for member in ("", "1.png"):
            assert Rejected(**about, image=path, member=member).picture() is None
    assert Rejected(**about, image=str(tmp_path / "a.tar"), member="1.png").picture()
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_bounded(tmp_path / "a.tar", 3)
    with pytest.raises(OSError, match="not a regular file"):
        ImageRef("zero", path=Path("/dev/zero")).read()
    with pytest.raises(KeyError):
        read_image(tmp_path / "a.tar", "2.png")
