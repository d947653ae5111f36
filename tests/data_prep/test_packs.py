import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.common.files import FileEntry, sha256_file, sha256_line
from data_prep.common.store_index import write_store_index
from data_prep.common.supervision import predicts_target
from data_prep.packs import Manifest, PackReader, PackRow, Source, write_rows

LENGTH = 16


def random_row(rng: np.random.Generator) -> PackRow:
    segments = np.sort(rng.integers(1, 4, LENGTH - 3)).astype(np.int32)
    segment = np.concatenate([segments, np.zeros(3, dtype=np.int32)])
    generated = (rng.integers(0, 2, LENGTH) * (segment > 0)).astype(np.uint8)
    images = int(rng.integers(1, 4))
    return PackRow(
        input_ids=rng.integers(0, 100, LENGTH).astype(np.int32),
        modality=rng.integers(0, 2, LENGTH).astype(np.int8),
        segment=segment,
        instance=rng.integers(-1, images, LENGTH).astype(np.int16),
        generated=generated,
        image_row=rng.integers(0, 9, images).astype(np.int64),
        n_target=int(predicts_target(segment, generated).sum()),
        source=(Source("a", "b", 3, "colour"), Source("c", "d", 4), Source("e", "f", 5)),
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
    manifest = replace(Manifest.load(folder[0]), seq_len=32)
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
    "text", ["{", "[]", json.dumps({"format": "other"}), json.dumps({"format": "mma-pack", "version": 1})]
)
def test_a_foreign_manifest_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"),
    [("input_ids", 100), ("input_ids", -1), ("segment", 4), ("segment", -2), ("instance", 9), ("instance", -2),
     ("modality", 77), ("generated", 2), ("image_row", -1), ("n_target", -1), ("n_target", LENGTH + 1)],
)  # fmt: skip
def test_a_damaged_value_is_an_error_that_names_file_row_and_column(
    folder: tuple[Path, list[PackRow]], column: str, value: int
) -> None:
    bad = replace(folder[1][5], n_target=value) if column == "n_target" else folder[1][5]
    if column != "n_target":
        values = getattr(bad, column).copy()
        values[0] = value
        bad = replace(bad, **{column: values})
    write_rows(folder[0] / "rows-00001.arrow", [folder[1][4], bad, folder[1][6]], LENGTH)
    reader = PackReader(folder[0])  # hashes are not checked
    assert same(reader[4], folder[1][4])
    with pytest.raises(
        UserError, match=rf"rows-00001.arrow: row 1 \(row 5 of .* column {column} holds {value}, outside"
    ):
        reader[5]
    if column == "segment":
        with pytest.raises(UserError, match="column segment"):
            reader.segment(5)


def test_image_rows_are_checked_against_the_store(folder: tuple[Path, list[PackRow]]) -> None:
    manifest = replace(Manifest.load(folder[0]), image_store="../store")
    (folder[0] / "manifest.json").write_text(manifest.to_json())
    write_store_index(folder[0].parent / "store", [FileEntry("images-00000.arrow", 9, "", rows=3)])
    wrong = next(index for index, row in enumerate(folder[1]) if row.image_row.max() >= 3)
    with pytest.raises(UserError, match=r"column image_row holds [3-8], outside 0 to 2"):
        PackReader(folder[0])[wrong]


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_of_rows_give_rows_or_one_error_even_without_hashes(
    folder: tuple[Path, list[PackRow]], seed: int
) -> None:
    path, rng = folder[0] / "rows-00000.arrow", np.random.default_rng(seed)
    content = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            list(PackReader(folder[0]))
        except UserError as error:
            assert "\n" not in str(error)


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rows": 7', '"rows": "7"', "rows"),
        ('"rows": 7', '"rows": 7.0', "rows"),
        ('"rows": 7', '"rows": true', "rows"),
        ('"rows": 7', '"rows": -7', "greater than or equal to 0"),
        ('"rows": 7', '"rows": 8', "rows=8, but its files hold 7"),
        ('"rows": 7', f'"rows": {"9" * 5000}', "number out of range"),
        ('"rows": 7', f'"rows": {"9" * 4000}', "rows"),
        ('"rows": 7', f'"rows": {DEEP}', "recursion"),
        ('"rows": 7', '"rows": NaN', "malformed"),
        ('"rows": 7', '"rows": 7, "more": 1', "unknown key more"),
        ('"rows": 7,', "", "rows is missing"),
        ('"seq_len": 16', '"seq_len": 0', "seq_len"),
        ('"seq_len": 16', '"seq_len": 12', "7 rows of 12"),
        ('"pad_id": 0', '"pad_id": 100', "pad_id=100 is not below vocab_size=100"),
        ('"files": [', '"files": [7, ', "files.0"),
        ("rows-00000.arrow", "../../etc/passwd", "files.0.name: must be a relative path"),
        ("rows-00000.arrow", "/etc/passwd", "files.0.name: must be a relative path"),
        ('"corpora": {}', '"corpora": {"a": {"draws": -1}}', "corpora.a.draws"),
        ('"version": 3', '"version": [2]', r"version \[2\], this release reads version 3"),
        ('"format": "mma-pack"', f'"format": "{"x" * 9999}"', "not a file of format mma-pack"),
        ("{", "\udcff{", "malformed"),
        ("{", "7 {", "malformed"),
    ],
)
def test_a_wrong_value_in_a_manifest_is_one_short_line(
    folder: tuple[Path, list[PackRow]], old: str, new: str, words: str
) -> None:
    path = folder[0] / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=words) as caught:
        Manifest.load(folder[0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


def test_a_manifest_is_checked_against_the_hash_beside_it(folder: tuple[Path, list[PackRow]]) -> None:
    path = folder[0] / "manifest.json"
    path.with_suffix(".sha256").write_bytes(sha256_line(sha256_file(path), path.name))
    Manifest.load(folder[0])
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"manifest.json: differs from manifest.sha256"):
        Manifest.load(folder[0])
