"""Datasets of the Hugging Face library: ``save_to_disk`` folders, local folders, names on the Hub without network."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.common.errors import UserError
from data_prep.corpora import build_corpus, dataset_source
from data_prep.corpora.dataset_source import DatasetSource
from data_prep.example import Example
from data_prep.packs import PackReader
from tests.data_prep.init.own_data import ROWS, conversations, parquet, questions, saved, saved_splits
from tests.data_prep.raw import make_recipe, prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACK = {"corpora": ["own"], "template": "plain", "seq_len": 64, "epochs": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for cached in (dataset_source._builder, dataset_source._stored, dataset_source._streamed):
        cached.cache_clear()
    return folder


def samples(kind: str, options: dict[str, Any], root: Path) -> list[tuple[Any, ...]]:
    """The turns of every sample, images as their bytes."""
    corpus = build_corpus(kind, options, root)
    items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
    assert all(isinstance(item, Example) for item in items), items
    return [
        tuple(part if isinstance(part, str) else part.read() for turn in item.turns for part in turn.parts)
        for item in items
        if isinstance(item, Example)
    ]


def test_a_saved_folder_is_read_as_a_folder_in_its_own_order(tmp_path: Path) -> None:
    saved(tmp_path)
    found = samples("chat", {"data": "saved"}, tmp_path)
    assert [said for _, said, _ in found] == [f"name {n}" for n in range(ROWS)]
    assert found == samples("chat", {"data": "saved/*.arrow"}, tmp_path)
    assert found == samples("chat", {"dataset": {"path": "saved"}}, tmp_path)


def test_a_folder_of_several_splits_needs_a_name(tmp_path: Path) -> None:
    saved_splits(tmp_path)
    assert len(samples("chat", {"data": "saved/validation"}, tmp_path)) == 6
    assert len(samples("chat", {"dataset": {"path": "saved", "split": "validation"}}, tmp_path)) == 6
    with pytest.raises(UserError, match="holds the splits train, validation: name one, such as saved/train"):
        build_corpus("chat", {"data": "saved"}, tmp_path)
    with pytest.raises(UserError, match=r"\(did you mean 'train'\?\); .*saved has train, validation"):
        build_corpus("chat", {"dataset": {"path": "saved", "split": "trian"}}, tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), r"state\.json: damaged"),
        (
            lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}'),
            "lists x, which",
        ),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), "which is missing; copy the folder again"),
        (lambda folder: (folder / "state.json").unlink(), "not a folder written by save_to_disk"),
    ],
)
def test_a_damaged_saved_folder_is_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        build_corpus("chat", {"data": "saved"}, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder_gives_the_samples_of_its_files(streaming: bool, tmp_path: Path) -> None:
    parquet(tmp_path / "mine")
    direct = samples("table", {"data": "mine/*.parquet"}, tmp_path)
    loaded = samples("table", {"dataset": {"path": "mine", "streaming": streaming}}, tmp_path)
    assert len(loaded) == ROWS and loaded == direct


def test_a_stream_of_several_shards_gives_every_row_once(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(questions(), parquet(tmp_path / "mine").with_name(f"{number}.parquet"))
    (tmp_path / "mine" / "questions.parquet").unlink()
    corpus = build_corpus("table", {"dataset": {"path": "mine", "streaming": True}}, tmp_path)
    assert corpus.shards() == ["stream-00000", "stream-00001", "stream-00002"]
    assert [path.name for path in corpus.files()] == ["0.parquet", "1.parquet", "2.parquet"]
    ids = [item.id for shard in corpus.shards() for item in corpus.examples(shard) if isinstance(item, Example)]
    assert len(set(ids)) == 3 * ROWS


def test_a_streamed_dataset_is_packed_and_its_changes_are_seen(tmp_path: Path) -> None:
    parquet(tmp_path / "raw" / "mine")
    corpora = {"own": {"type": "table", "dataset": {"path": "mine", "streaming": True}}}
    recipe = make_recipe(tmp_path, corpora=corpora, packs={"sft": PACK})
    prepare(recipe)
    assert sum(len(row.source) for row in PackReader(tmp_path / "out" / "packs" / "sft")) == ROWS
    pq.write_table(questions().slice(0, 5), tmp_path / "raw" / "mine" / "questions.parquet")
    dataset_source._builder.cache_clear()
    dataset_source._streamed.cache_clear()
    prepare(make_recipe(tmp_path, corpora=corpora, packs={"sft": PACK}))
    assert sum(len(row.source) for row in PackReader(tmp_path / "out" / "packs" / "sft")) == 5


def test_images_of_a_dataset_with_image_features_keep_their_bytes(tmp_path: Path) -> None:
    whole = conversations().cast_column("image", datasets.Image(decode=True))
    (tmp_path / "mine").mkdir()
    whole.to_parquet(str(tmp_path / "mine" / "train.parquet"))
    wanted = samples("chat", {"data": "mine/*.parquet"}, tmp_path)
    for streaming in (False, True):
        assert samples("chat", {"dataset": {"path": "mine", "streaming": streaming}}, tmp_path) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "a.jsonl", "dataset": {"path": "mine"}}, "table: set either data or dataset"),
        ({"dataset": {}}, r"table\.dataset\.path is missing"),
        ({"dataset": {"path": "mine", "splt": "x"}}, r"unknown key table\.dataset\.splt"),
        ({"dataset": {"path": "mine", "split": "train[:10%]"}}, "must be the name of one split, not a slice"),
        ({"dataset": {"path": "mine", "split": "test"}}, 'dataset mine: Unknown split "test"'),
        ({"dataset": {"path": "gone"}}, "neither a folder below .* nor a name on the Hub"),
        ({"dataset": {"path": "tars"}}, "format webdataset is not supported; use one of parquet"),
        ({"dataset": {"path": "script"}}, "dataset script: "),
        ({"dataset": {"path": "broken"}}, "dataset broken: "),
    ],
)
def test_what_cannot_be_loaded_is_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    parquet(tmp_path / "mine")
    for name, file, content in (
        ("tars", "0.tar", b"\0" * 10240),
        ("script", "script.py", b"import pathlib; pathlib.Path('ran').touch()"),
        ("broken", "a.parquet", b"PAR1 no"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build_corpus("table", options, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("ran"))


def test_a_hub_name_that_is_not_cached_is_one_line_at_once_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(*_: object, **__: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    dataset_source._hub_answers.cache_clear()
    began = time.monotonic()
    with pytest.raises(UserError, match="the Hub cannot be reached and the cache does not hold it") as caught:
        build_corpus("table", {"dataset": {"path": "nobody/nothing"}}, tmp_path)
    dataset_source._hub_answers.cache_clear()
    assert "\n" not in str(caught.value) and time.monotonic() - began < 20


def cached_on_the_hub(cache: Path, table: pa.Table, commit: str, tmp_path: Path) -> None:
    """Put a dataset into the cache as if ``owner/things`` had been downloaded at a commit."""
    folder = tmp_path / "things"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    builder = datasets.load_dataset_builder(str(folder))
    builder.download_and_prepare()
    target = cache / "owner___things" / "default" / "0.0.0" / commit
    shutil.copytree(builder.cache_dir, target)


def test_a_hub_dataset_is_pinned_to_its_commit_in_the_manifest(cache: Path, tmp_path: Path) -> None:
    cached_on_the_hub(cache, questions(), COMMIT, tmp_path)
    corpora = {"own": {"type": "table", "dataset": {"path": "owner/things"}}}
    recipe = make_recipe(tmp_path, corpora=corpora, packs={"sft": PACK})
    (tmp_path / "raw").mkdir(exist_ok=True)
    prepare(recipe)
    reader = PackReader(tmp_path / "out" / "packs" / "sft")
    manifest = reader.manifest
    assert manifest.recipe["sources"]["own"]["dataset"]["revision"] == COMMIT
    assert json.loads((tmp_path / "out" / "ingest" / "dataset-owner--things.json").read_text()) == {"commit": COMMIT}
    assert sum(len(row.source) for row in reader) == ROWS


def test_another_commit_than_the_pinned_one_is_refused(cache: Path, tmp_path: Path) -> None:
    """Offline, ``datasets`` itself takes the newest commit of its cache, whatever was asked for."""
    cached_on_the_hub(cache, questions(), COMMIT, tmp_path)
    for revision, message in (
        ("f" * 40, f"the cache holds commit {COMMIT}, not {'f' * 40}"),
        ("main", "the Hub cannot be reached to look up revision 'main': set dataset.revision to a commit"),
    ):
        with pytest.raises(UserError, match=message):
            build_corpus("table", {"dataset": {"path": "owner/things", "revision": revision}}, tmp_path)
    source = DatasetSource(path="owner/things")
    assert source.pinned(tmp_path).revision == COMMIT
    assert len(source.pinned(tmp_path).arrow_files(tmp_path)) == 1
