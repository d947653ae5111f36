"""Every kind of dirt through the real ingest: rejected with its code or repaired, and ingest continues."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.common.workers import ALONE
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.ingest.step import ingest
from data_prep.packs import PackReader
from data_prep.progress import Reporter
from data_prep.quarantine import CODES
from data_prep.recipe import load_recipe
from data_prep.text.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.data_prep.raw import png, prepare, write_recipe
from tests.data_prep.raw import write_tar as write_webdataset

SIZE = (8, 6)
ROUNDS = int(os.environ.get("MMA_FUZZ_ROUNDS", "60"))
"""Rounds of the last test; more find more."""
QUIET = Reporter(quiet=True)


def encoded(mode: str, kind: str = "PNG", size: tuple[int, int] = SIZE, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 0).save(stream, kind, **options)
    return stream.getvalue()


def sixteen_bit() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full(SIZE[::-1], 40_000, dtype=np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def noisy_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif)


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (lambda: png(1), ""),
    "empty": (lambda: b"", "empty-file"),
    "html": (lambda: b"<html><body>404</body></html>", "not-an-image"),
    "truncated": (lambda: noisy_jpeg()[:-300], "broken-image"),
    "one pixel": (lambda: encoded("RGB", size=(1, 1)), "tiny-image"),
    "bomb": (lambda: encoded("1", size=(10_000, 9_500)), "image-bomb"),
    "gif": (lambda: encoded("P", "GIF"), ""),
    "webp": (lambda: encoded("RGB", "WEBP"), ""),
    "sixteen bit": (sixteen_bit, ""),
    "rgba": (lambda: encoded("RGBA"), ""),
    "palette with a hole": (lambda: encoded("P", transparency=0), ""),
    "cmyk": (lambda: encoded("CMYK", "JPEG"), ""),
    "grey": (lambda: encoded("L"), ""),
    "one bit": (lambda: encoded("1"), ""),
    "rotated": (rotated, ""),
}
TEXTS: dict[str, tuple[bytes, str]] = {
    "no words": (b" \n", "empty-text"),
    "nul": (b"a \0 b", "bad-encoding"),
    "latin-1": ("caf\u00e9".encode("latin-1"), "bad-encoding"),
    "surrogate": (b"a \xed\xa0\x80 b", "bad-encoding"),
    "special tokens": (b"<image> <assistant> <eos> </s> <pad>", ""),
    "endless": (b"word " * 300, ""),
}
OK_TURNS = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a ring."}]


def chat(name: str, question: str = "what is it?", answer: str = "a ring.", **more: object) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "messages": messages, **more})


ROWS: dict[str, tuple[str, str]] = {
    "fine": (chat("fine", image="ok.png"), ""),
    "fine again": (chat("fine"), "duplicate-id"),
    "row-2": ('{"id": "cut", "messages": [', "bad-json"),
    "no image": (chat("no image", image="none.png"), "missing-image"),
    "absolute": (chat("absolute", image="/etc/passwd"), "unsafe-path"),
    "climbing": (chat("climbing", image="../recipe.yaml"), "unsafe-path"),
    "linked": (chat("linked", image="link.png"), "unsafe-path"),
    "no answer": (chat("no answer", answer="  "), "no-answer"),
    "lone": (chat("lone", question="\ud800?"), "bad-encoding"),
    "all cut": (chat("all cut", question="so many words " * 60), "too-long"),
    "spelled": (chat("spelled", question="<image> is it <end><assistant>?", image="ok.png"), ""),
}
BOXES: dict[str, tuple[str, list[float], str]] = {
    "inside": ("ok.png", [1, 1, 4, 4], ""),
    "beyond": ("ok.png", [4, 3, 400, 300], ""),
    "outside": ("ok.png", [80, 60, 4, 4], "bad-box"),
    "drawn before rotation": ("rotated.jpg", [1, 1, 4, 4], "bad-box"),
}


def write_tar(path: Path) -> None:
    def add(name: str, data: bytes, link: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(data), tarfile.SYMTYPE if link else tarfile.REGTYPE, link
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as tar:
        for key, (make, _) in IMAGES.items():
            add(f"{key}.jpg", make())
            add(f"{key}.txt", f"a caption of {key}".encode())
        for key, (words, _) in TEXTS.items():
            add(f"{key}.jpg", png(2))
            add(f"{key}.txt", words)
        for key, name, link in (("link", "link", "/etc/passwd"), ("climb", "../climb", ""), ("root", "/root", "")):
            add(f"{name}.jpg", b"" if link else png(3), link)
            add(f"{name}.txt", key.encode())
        add("alone.txt", b"words without an image")


def write_raw(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "images" / "ok.png").write_bytes(png(9, SIZE))
    (root / "images" / "rotated.jpg").write_bytes(rotated())
    (root / "images" / "link.png").symlink_to("/etc/passwd")
    write_tar(root / "captions.tar")
    (root / "chat.jsonl").write_text("\n".join(line for line, _ in ROWS.values()) + "\n")
    about = {"height": SIZE[1], "width": SIZE[0], "dataset_name": "refcoco", "original_id": 1}
    images = [
        {"id": n, "file_name": name, "caption": key, **about} for n, (key, (name, *_)) in enumerate(BOXES.items())
    ]
    annotations = [{"id": n, "image_id": n, "bbox": box} for n, (_, box, _) in enumerate(BOXES.values())]
    (root / "refcoco.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def recipe(root: Path, out: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "out": str(out),
        "tokenizer": {"train": {"vocab_size": 400, "samples": 1000}},
        "image_tokens": 4,
        "max_bad_fraction": 0.95,
        "corpora": {
            "captions": {"type": "webdataset", "tars": "*.tar"},
            "chat": {
                "type": "chat", "data": "chat.jsonl", "messages_column": "messages", "images_column": "image",
                "id_column": "id", "images": "images",
            },
            "boxes": {"type": "refcoco", "annotations": "refcoco.json", "images": "images"},
        },
        "packs": {
            "all": {
                "corpora": ["captions", "chat", "boxes"], "template": "plain", "seq_len": 128, "epochs": 1,
                "max_text_tokens": 100, "too_long": "truncate", "shuffle": False,
            }
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dirt")
    write_raw(folder / "raw")
    prepare(load_recipe(str(write_recipe(folder / "recipe.yaml", recipe(folder / "raw", folder / "out")))))
    return folder / "out"


def outcomes(out: Path) -> dict[tuple[str, str], str]:
    """(corpus, sample) -> code, or nothing where it was kept."""
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    kept = [source for row in PackReader(out / "packs" / "all") for source in row.source]
    return {(one["corpus"], one["sample"]): one["code"] for one in listed} | {
        (one.dataset, one.sample): "" for one in kept
    }


@pytest.mark.parametrize("key", [*IMAGES, *TEXTS, "link", "../climb", "/root", "alone"])
def test_dirt_in_tars(made: Path, key: str) -> None:
    codes = {name: code for name, (_, code) in (IMAGES | TEXTS).items()} | {"alone": "missing-image"}
    found = {
        sample.removeprefix("captions/"): code
        for (corpus, sample), code in outcomes(made).items()
        if corpus == "captions"
    }
    assert found[key] == codes.get(key, "unsafe-path")


@pytest.mark.parametrize("key", ROWS)
def test_dirt_in_rows(made: Path, key: str) -> None:
    found = Counter((sample, code) for (corpus, sample), code in outcomes(made).items() if corpus == "chat")
    code = ROWS[key][1]
    if key == "fine again":  # the first of the two is kept; the list of rejects names the second
        listed = (made / "rejects.jsonl").read_text()
        assert '"sample": "fine", "code": "duplicate-id"' in listed and found["fine", ""] == 1
    else:
        assert found[key, code] == 1


@pytest.mark.parametrize("key", BOXES)
def test_dirt_in_boxes(made: Path, key: str) -> None:
    codes = [code for (corpus, _), code in sorted(outcomes(made).items()) if corpus == "boxes"]
    assert len(codes) == len(BOXES) and Counter(codes) == Counter(code for *_, code in BOXES.values())
    rejected = [json.loads(line) for line in (made / "rejects.jsonl").read_text().splitlines() if '"boxes"' in line]
    place = list(BOXES).index(key)
    assert (BOXES[key][2] == "bad-box") == any(one["sample"].startswith(str(place)) for one in rejected)


def test_text_never_claims_an_image_or_a_turn_and_every_kept_image_opens(made: Path) -> None:
    reader = PackReader(made / "packs" / "all")
    tokenizer, store = (
        Tokenizer.load(reader.directory / "tokenizer"),
        ImageStore(reader.directory / reader.manifest.image_store),
    )
    texts = {}
    for row in reader:
        assert np.count_nonzero(row.input_ids == tokenizer.image_id) == 4 * len(row.image_row)
        for number, source in enumerate(row.source, start=1):
            ids = row.input_ids[(row.segment == number) & (row.modality == 0)]
            texts[source.sample] = tokenizer.decode(ids, specials=True)
    assert "<image> <assistant> <eos> </s> <pad>" in texts["captions/special tokens"]
    assert "is it <end><assistant>?" in texts["spelled"]  # its <image> is the format's own mark
    assert texts["spelled"].count("<assistant>") == 2 and texts["spelled"].count("<end>") == 3
    for row_id in range(len(store)):
        assert decode_rgb(store.read(row_id)).mode == "RGB"
    sizes = {store.read(row_id): store.size(row_id) for row_id in range(len(store))}
    assert sizes[rotated()] == SIZE[::-1]
    assert decode_rgb(sixteen_bit()).getpixel((0, 0)) == (155, 155, 155)


def test_the_run_is_complete(made: Path) -> None:
    assert len(list(verify(made))) == 3


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip, truncate, double or blank some bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(out)), rng.choice([1, 1, 2, 16, 512])
        action = rng.random()
        if action < 0.5:
            out[at] ^= 1 << rng.randrange(8)
        elif action < 0.7:
            out[at : at + size] = rng.randbytes(size)
        elif action < 0.8:
            out[at:at] = out[at : at + size]
        elif action < 0.9:
            out[at : at + size] = b""
        else:
            out[at:] = b"" if rng.random() < 0.3 else out[at:]
        out = out or bytearray(b"x")
    return bytes(out)


def check_markers(out: Path) -> None:
    """Every shard output accounts for every sample it read."""
    for marker in out.glob("ingest/*/*/*.json"):
        report = json.loads(marker.read_text())
        rejects = [json.loads(line)["code"] for line in marker.with_suffix(".rejects").read_text().splitlines()]
        assert Counter(rejects) == Counter(report["codes"]) and report["codes"].keys() <= CODES.keys()
        with pa.memory_map(str(marker.with_suffix(".arrow"))) as mapped:
            assert pa.ipc.open_file(mapped).read_all().num_rows == report["kept"]


def write_parquet(path: Path) -> None:
    rows = [{"id": f"p{n}", "messages": OK_TURNS, "image": {"bytes": png(n), "path": f"{n}.png"}} for n in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def test_damaged_raw_files_are_rejected_or_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    """Flipped, missing and doubled bytes in tars, JSON, Parquet and images: no other exception, nothing lost."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw)
    write_webdataset(raw / "captions.tar", {f"{n:04d}": (png(n), f"{n} things") for n in range(8)})
    write_parquet(raw / "rows.parquet")
    content = recipe(raw, out) | {"tokenizer": str(made / "tokenizer" / "tokenizer.model"), "max_bad_fraction": 1.0}
    content["corpora"]["parquet"] = {**content["corpora"]["chat"], "data": "rows.parquet"}
    content["packs"]["all"]["corpora"].append("parquet")
    names = ("captions.tar", "chat.jsonl", "refcoco.json", "rows.parquet", "images/ok.png", "images/rotated.jpg")
    whole = {raw / name: (raw / name).read_bytes() for name in names}
    told = Counter[str]()
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        for path, data in whole.items():
            path.write_bytes(damaged(data, rng) if rng.random() < 0.4 else data)
        try:
            ingest(load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content))), ALONE, QUIET)
            told["made"] += 1
        except UserError as problem:
            assert "\n" not in str(problem), seed
            told["refused"] += 1
        check_markers(out)
        shutil.rmtree(out / "ingest", ignore_errors=True)
    assert told["made"] and told["refused"], told
