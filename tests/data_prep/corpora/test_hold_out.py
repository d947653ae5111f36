"""Held-out parts: complete, disjoint by image, independent of order and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.common.errors import UserError
from data_prep.corpora import Corpus, build_corpus
from data_prep.example import Example
from tests.data_prep.raw import png

IMAGES = 40


def rows() -> list[dict[str, Any]]:
    """Three questions about each image, five without one, and an unusable row."""
    asked = [{"image": f"{n % IMAGES}.png", "question": f"q{n}", "answer": "a"} for n in range(3 * IMAGES)]
    return [*asked, *({"question": f"t{n}", "answer": "a"} for n in range(5)), {"question": "q"}]


def build(root: Path, name: str, given: list[dict[str, Any]], **options: Any) -> Corpus:
    root.mkdir(exist_ok=True)
    for n in range(IMAGES):
        (root / f"{n}.png").write_bytes(png(n))
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in given))
    return build_corpus("table", {"data": name, **options}, root)


def questions(corpus: Corpus) -> dict[str, str]:
    """Image name by question; rejects under their codes."""
    items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
    return {
        str(item.turns[0].parts[-1]) if isinstance(item, Example) else item.code: (
            item.images[0].name if isinstance(item, Example) and item.images else ""
        )
        for item in items
    }


def test_the_parts_are_complete_and_share_no_image(tmp_path: Path) -> None:
    whole = questions(build(tmp_path, "a.jsonl", rows()))
    train = questions(build(tmp_path, "a.jsonl", rows(), hold_out=0.25))
    held = questions(build(tmp_path, "a.jsonl", rows(), hold_out=0.25, part="held_out"))
    assert {**train, **held} == whole and not train.keys() & held.keys()
    assert not set(train.values()) & set(held.values()) - {""}
    assert "missing-key" in train or "no-answer" in train, "rejects are counted once, in the training part"
    assert 3 <= len(set(held.values())) <= 20


def test_an_image_is_on_the_same_side_in_any_order_and_file(tmp_path: Path) -> None:
    sides = []
    for name, given in (("a.jsonl", rows()), ("b.jsonl", rows()[::-1])):
        found = questions(build(tmp_path, name, given, hold_out=0.25, part="held_out"))
        sides.append({image for image in found.values() if image})
    assert sides[0] == sides[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "held_out"}, r"table\.hold_out is missing"),
        ({"hold_out": 1.0}, r"table\.hold_out: .*less than 1"),
        ({"hold_out": 0.1, "part": "test"}, r"table\.part: .*'train' or 'held_out'"),
        ({"holdout": 0.1}, r"unknown option \(did you mean 'hold_out'\?\)"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, "a.jsonl", rows(), **options)
