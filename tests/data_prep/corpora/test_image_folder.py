"""Folders of images with caption files: what must not be read, and what changes make stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.corpora import build_corpus
from data_prep.example import Example, Reject
from tests.data_prep.raw import png


def outcomes(root: Path) -> dict[str, str]:
    """Caption or reason code by image."""
    corpus = build_corpus("image_folder", {"images": "pics"}, root)
    items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
    return {
        item.id if isinstance(item, Example) else item.sample: (
            str(item.turns[1].parts[0]) if isinstance(item, Example) else item.code
        )
        for item in items
        if isinstance(item, Example | Reject)
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "pics" / f"{name}.png").write_bytes(png(1))
    (tmp_path / "pics" / "a.txt").write_text("a caption")
    return tmp_path


def test_links_out_of_the_folder_pipes_and_large_files_are_not_read(root: Path) -> None:
    (root / "secret.txt").write_text("secret")
    (root / "pics" / "b.txt").symlink_to(root / "secret.txt")
    os.mkfifo(root / "pics" / "c.txt")
    (root / "pics" / "d.png").symlink_to(root / "pics" / "a.png")
    (root / "pics" / "d.txt").write_bytes(b"x" * (2 << 20))
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "e.png").write_bytes(png(2))
    (root / "pics" / "linked").symlink_to(root / "elsewhere")
    assert outcomes(root) == {
        "a.png": "a caption",
        "b.png": "unsafe-path",
        "c.png": "missing-image",
        "d.png": "bad-json",
    }


def test_a_new_caption_file_changes_the_files_of_its_shard(root: Path) -> None:
    before = build_corpus("image_folder", {"images": "pics"}, root)
    assert before.files() == before.files_of("rows-00000000") == [root / "pics" / "a.txt"]
    (root / "pics" / "b.json").write_text('{"caption": "late"}')
    after = build_corpus("image_folder", {"images": "pics"}, root)
    assert after.files_of("rows-00000000") == [root / "pics" / "a.txt", root / "pics" / "b.json"]
    assert outcomes(root)["b.png"] == "late"


def test_captions_may_lie_in_a_folder_of_their_own(root: Path) -> None:
    (root / "texts").mkdir()
    (root / "texts" / "b.txt").write_text("from elsewhere")
    corpus = build_corpus("image_folder", {"images": "pics", "captions": "texts"}, root)
    found = [item for item in corpus.examples("rows-00000000") if isinstance(item, Example)]
    assert [(item.id, item.turns[1].parts) for item in found] == [("b.png", ("from elsewhere",))]
