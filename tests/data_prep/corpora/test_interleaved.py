"""Interleaved documents from raw files to packed rows: exact spans, splits before images, missing images."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.example import Example, ImageRef, Turn
from data_prep.packs import Manifest, PackReader
from data_prep.text.documents import Limits, Size, blocks, split_to_fit, without_images
from data_prep.text.template import Template
from data_prep.text.tokenizer import Tokenizer
from pipeline.masks import Sidecars, get_policy, prove
from tests.data_prep.raw import make_recipe, png, prepare

IMAGE_TOKENS, LENGTH = 4, 64


def words(number: int, count: int) -> str:
    return " ".join(f"word {number} {n}" for n in range(count))


def write_document(root: Path, name: str, parts: Sequence[str | int | None]) -> dict[str, Any]:
    """An OBELICS row: text, the number of an image, or None for a missing image."""
    images = [part if part is None or isinstance(part, int) else "" for part in parts]
    for number in filter(None, images):
        (root / "images" / f"{number}.png").write_bytes(png(int(number)))
    addresses = [None if one == "" else f"https://example.org/{'gone' if one is None else one}.png" for one in images]
    return {"id": name, "images": addresses, "texts": [part if isinstance(part, str) else None for part in parts]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("documents")
    raw = folder / "raw"
    (raw / "images").mkdir(parents=True)
    documents: dict[str, list[Any]] = {
        "short": [1, "a picture of one", 2, "and of two"],
        "opens": ["it begins with words", 3, "and has one picture"],
        "long": [part for n in range(4, 16) for part in (n, words(n, 2))],
        "gallery": [16, 17, "two at once"],
        "lossy": [None, "lost", 18, "kept", None, "lost again"],
        "lost": [None, "all", None, "gone"],
        "broken": [19, "a broken one", 20, "a whole one"],
    }
    rows = [write_document(raw, name, parts) for name, parts in documents.items()]
    (raw / "images" / "19.png").write_bytes(png(19)[:-30])
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 9, 9)).save(stream, "GIF")
    (raw / "images" / "20.png").write_bytes(stream.getvalue())
    (raw / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        make_recipe(
            folder,
            corpora={"docs": {"type": "interleaved", "data": "docs.jsonl", "id_column": "id"}},
            packs={
                "pt": {
                    "corpora": ["docs"],
                    "template": "caption",
                    "seq_len": LENGTH,
                    "epochs": 1,
                    "max_images": 3,
                    "prompts": ["Look: "],
                }
            },
            max_bad_fraction=0.2,
        )
    )
    return folder / "out", documents


def segments(reader: PackReader) -> dict[str, tuple[Any, Any]]:
    """Sample -> (row, positions of its tokens)."""
    return {
        source.sample: (row, np.flatnonzero(row.segment == number))
        for row in reader
        for number, source in enumerate(row.source, start=1)
    }


def read_back(reader: PackReader, sample: str) -> list[tuple[bool, str]]:
    """(generated, text) of the runs of a sample; an image is ``[n]``, numbered within the sample."""
    row, places = segments(reader)[sample]
    tokenizer = Tokenizer.load(reader.directory / "tokenizer")
    found: list[tuple[bool, str]] = []
    keys = [(int(row.instance[at]), bool(row.generated[at])) for at in places]
    starts = [n for n in range(len(places)) if n == 0 or keys[n] != keys[n - 1]]
    for first, end in zip(starts, [*starts[1:], len(places)], strict=True):
        instance, generated = keys[first]
        if instance >= 0:
            assert end - first == IMAGE_TOKENS
            found.append((False, f"[{instance - int(row.instance[places].clip(0)[row.instance[places] >= 0].min())}]"))
        else:
            found.append((generated, tokenizer.decode(row.input_ids[places[first:end]], specials=True)))
    return found


def test_text_is_generated_and_images_are_given_in_reading_order(packed: tuple[Path, Any]) -> None:
    reader = PackReader(packed[0] / "packs" / "pt")
    assert read_back(reader, "short") == [
        (False, "[0]"),
        (True, "a picture of one"),
        (False, "[1]"),
        (True, "and of two<eos>"),
    ]
    assert read_back(reader, "opens") == [
        (True, "it begins with words"),
        (False, "[0]"),
        (True, "and has one picture<eos>"),
    ]
    asked = [(False, "[0]"), (False, "[1]"), (False, "Look: "), (True, "two at once<eos>")]
    assert read_back(reader, "gallery") == asked, "images followed by one text are a caption, which takes a prompt"


def test_a_long_document_is_split_before_images_and_ends_once(packed: tuple[Path, Any]) -> None:
    reader = PackReader(packed[0] / "packs" / "pt")
    found = segments(reader)
    parts = sorted((name for name in found if name.startswith("long#")), key=lambda name: int(name[5:]))
    assert len(parts) >= 4 and parts[0] == "long#1"
    texts = []
    for name in parts:
        row, places = found[name]
        runs = read_back(reader, name)
        assert len(places) <= LENGTH and 1 <= sum(text.startswith("[") for _, text in runs) <= 3
        assert [text.startswith("[") for _, text in runs] == [True, False] * (len(runs) // 2)
        assert row.instance[places[0]] >= 0 and row.generated[places[-1]] == 1
        texts += [text for generated, text in runs if generated]
    assert texts == [words(n, 2) for n in range(4, 15)] + [words(15, 2) + "<eos>"]


def test_missing_images_are_dropped_and_counted(packed: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    reader = PackReader(packed[0] / "packs" / "pt")
    assert read_back(reader, "lossy") == [(True, "lost"), (False, "[0]"), (True, "kept\n\nlost again<eos>")]
    assert read_back(reader, "broken") == [(True, "a broken one"), (False, "[0]"), (True, "a whole one<eos>")]
    assert reader.manifest.corpora["docs"].repairs == {"image-dropped": 3, "misnamed-image": 1}
    [line] = (packed[0] / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "lost" and json.loads(line)["code"] == "missing-image"
    assert main(["stats", str(packed[0])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "docs: repaired 3 x image-dropped" in shown and "docs: repaired 1 x misnamed-image" in shown


def test_a_missing_image_can_reject_the_document(packed: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(packed[0].parent / "raw", tmp_path / "raw")
    corpus = {"type": "interleaved", "data": "docs.jsonl", "id_column": "id", "missing": "reject"}
    pack = {"corpora": ["docs"], "template": "plain", "seq_len": 512, "epochs": 1}
    prepare(make_recipe(tmp_path, corpora={"docs": corpus}, packs={"pt": pack}, max_bad_fraction=0.5))
    reader = PackReader(tmp_path / "out" / "packs" / "pt")
    assert set(segments(reader)) == {"short", "opens", "long", "gallery"}
    assert len(read_back(reader, "long")) == 24


def _document(texts: Sequence[int]) -> Example:
    turns = [
        turn
        for number, length in enumerate(texts)
        for turn in (Turn("user", (ImageRef(f"{number}", data=b""),)), Turn("assistant", ("x" * length,)))
    ]
    return Example("d", tuple(turns), kind="document")


@pytest.mark.parametrize(
    ("texts", "room", "parts"),
    [
        ([5, 5], Limits(100, None, None), [2]),
        ([5, 5], Limits(15, None, None), [1, 1]),  # 14 tokens each with their image; the end token counts
        ([5, 5, 5], Limits(29, None, None), [2, 1]),
        ([5, 5, 5], Limits(28, None, None), [1, 1, 1]),
        ([5, 5, 5], Limits(100, 11, None), [2, 1]),
        ([5, 5, 5], Limits(100, None, 2), [2, 1]),
        ([50, 5, 5], Limits(40, None, None), [1, 2]),  # the first is too large alone: ingest truncates or rejects it
    ],
)
def test_parts_are_as_large_as_possible(texts: list[int], room: Limits, parts: list[int]) -> None:
    def measure(unit: Example) -> Size:
        said = sum(len(part) for turn in unit.turns for part in turn.parts if isinstance(part, str))
        return Size(said + 9 * len(unit.images), len(unit.images), 9)

    document = _document(texts)
    found = list(split_to_fit(document, room, measure))
    assert [len(blocks(part)) for part in found] == parts
    assert tuple(turn for part in found for turn in part.turns) == document.turns
    assert [part.continues for part in found] == [True] * (len(parts) - 1) + [False]
    assert [part.id for part in found] == (["d"] if len(parts) == 1 else [f"d#{n + 1}" for n in range(len(parts))])


def test_texts_around_a_dropped_image_become_paragraphs() -> None:
    document = _document([1, 2, 3])
    left = without_images(document, [document.images[1]])
    assert [turn.role for turn in left.turns] == ["user", "assistant", "user", "assistant"]
    assert left.turns[1].parts == ("x", "\n\n", "xx")


def test_a_document_takes_no_prompt_and_no_header() -> None:
    document = _document([1, 2])
    assert not Template("plain", prompts=("Look: ",)).takes_prompt(document)
    assert len(Template("plain").pieces(document)) == 5


def test_a_manifest_without_repairs_is_read(packed: tuple[Path, Any], tmp_path: Path) -> None:
    manifest = json.loads((packed[0] / "packs" / "pt" / "manifest.json").read_text())
    del manifest["corpora"]["docs"]["repairs"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.load(tmp_path).corpora["docs"].repairs == {}


def test_no_answer_leaks_in_a_row_of_documents(packed: tuple[Path, Any]) -> None:
    for row in PackReader(packed[0] / "packs" / "pt"):
        proof = prove(get_policy("mma"), Sidecars.from_row(row), 4)
        assert proof.leak_free and proof.kv_exact and proof.targets == row.n_target
