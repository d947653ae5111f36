import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.common.supervision import predicts_target
from data_prep.packs import Manifest, PackReader, PackRow, Source, write_rows

LENGTH = 16


def random_row(rng: np.random.Generator) -> PackRow:
    segments = np.sort(rng.integers(1, 4, LENGTH - 3)).astype(np.int32)
    segment = np.concatenate([segments, np.zeros(3, dtype=np.int32)])
    generated = (rng.integers(0, 2, LENGTH) * (segment > 0)).astype(np.uint8)
    return PackRow(
        input_ids=rng.integers(0, 100, LENGTH).astype(np.int32),
        modality=rng.integers(0, 2, LENGTH).astype(np.int8),
        segment=segment,
        instance=rng.integers(-1, 3, LENGTH).astype(np.int16),
        generated=generated,
        image_row=rng.integers(0, 9, int(rng.integers(0, 4))).astype(np.int64),
        n_target=int(predicts_target(segment, generated).sum()),
        source=(Source("a", "b", 3, "colour"), Source("c", "d", 4)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[PackRow]]:
    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(7)]
    files = (
        write_rows(tmp_path / "rows-00000.arrow", rows[:4], LENGTH),
        write_rows(tmp_path / "rows-00001.arrow", rows[4:], LENGTH),
    )
    manifest = Manifest(
        seq_len=LENGTH, rows=7, targets=sum(row.n_target for row in rows), tokens=7 * 13, image_tokens=2, images=9,
        max_images=3, max_segment_tokens=13, vocab_size=100, pad_id=0, image_id=1, eos_ids=(2,), tokenizer="tokenizer",
        tokenizer_sha256="", template="plain", plan_sha256="", image_store="", files=files,
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path, rows


def same(left: PackRow, right: PackRow) -> bool:
    names = ("input_ids", "modality", "segment", "instance", "generated", "image_row")
    arrays = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)
    return arrays and left.n_target == right.n_target and left.source == right.source


def test_rows_come_back_as_written_also_through_a_pickle(folder: tuple[Path, list[PackRow]]) -> None:
    reader = PackReader(folder[0], verify=True)
    assert len(reader) == 7
    assert all(same(got, wrote) for got, wrote in zip(reader, folder[1], strict=True))
    copy = pickle.loads(pickle.dumps(reader))
    assert same(copy[6], folder[1][6])
    assert reader.n_target(5) == folder[1][5].n_target
    with pytest.raises(IndexError):
        reader[7]


def test_targets_are_counted_by_the_definition() -> None:
    segment = np.array([1, 1, 1, 2, 2, 0], dtype=np.int32)
    generated = np.array([1, 1, 0, 1, 1, 1], dtype=np.uint8)
    expected = sum(
        bool(generated[t]) and segment[t] > 0 and segment[t] == segment[t - 1] for t in range(1, len(segment))
    )
    assert predicts_target(segment, generated).sum() == expected == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9), "differs from its manifest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "differs from its manifest"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["flipped", "truncated", "removed"],
)
def test_damage_is_found_and_named(folder: tuple[Path, list[PackRow]], damage, words: str) -> None:
    damage(folder[0] / "rows-00001.arrow")
    with pytest.raises(UserError, match=f"rows-00001.arrow.*{words}"):
        PackReader(folder[0], verify=True)


def test_a_row_file_of_another_length_is_refused(folder: tuple[Path, list[PackRow]]) -> None:
    manifest = replace(Manifest.load(folder[0]), seq_len=8)
    (folder[0] / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(UserError, match="not the rows its manifest lists"):
        PackReader(folder[0])[0]


def test_packs_rebuilt_while_they_are_read_are_never_mixed(folder: tuple[Path, list[PackRow]]) -> None:
    path, rows = folder[0] / "manifest.json", folder[1]
    text = path.read_text()
    reader, copy = PackReader(folder[0]), pickle.loads(pickle.dumps(PackReader(folder[0])))
    assert same(reader[0], rows[0])
    path.unlink()
    path.write_text(text)  # the same packs
    assert same(copy[0], rows[0])
    path.unlink()
    write_rows(folder[0] / "rows-00001.arrow", rows[1:4], LENGTH)  # of the same size and number
    with pytest.raises(UserError, match="the packs were rebuilt while they were read"):
        reader[4]
    path.write_text(text.replace('"seed": 0', '"seed": 9'))
    with pytest.raises(UserError, match="the packs were rebuilt while they were read"):
        copy[4]
    assert same(reader[3], rows[3])  # mapped before


def test_a_row_file_of_another_size_is_refused(folder: tuple[Path, list[PackRow]]) -> None:
    longer = [replace(row, source=(Source("another corpus", "and its sample" * 99, 0),)) for row in folder[1][4:]]
    write_rows(folder[0] / "rows-00001.arrow", longer, LENGTH)
    with pytest.raises(UserError, match=r"rows-00001.arrow: not the rows its manifest lists"):
        PackReader(folder[0])[4]


@pytest.mark.parametrize(
    "text", ["{", "[]", json.dumps({"format": "other"}), json.dumps({"format": "mma-pack", "version": 2})]
)
def test_a_foreign_manifest_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        Manifest.load(tmp_path)
