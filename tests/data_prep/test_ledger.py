"""``events.jsonl`` of an output folder: what is recorded, what is printed, and what ``--strict`` makes fatal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.common.events import EVENTS, EVENTS_FILE, EventLedger
from tests.data_prep.raw import png, recipe_dict, tree_hashes, write_recipe, write_tar, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    write_world(folder / "raw", tars=2, captions=6, talks=8)
    dirt = {"broken": (b"<html>", "a caption"), "empty": (png(2), "")}
    write_tar(folder / "raw" / "captions" / "dirt.tar", dirt)
    damaged = folder / "raw" / "captions" / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:4200])
    content = recipe_dict(folder / "raw", folder / "out") | {"max_bad_fraction": 0.9}
    del content["packs"]["eval"]
    write_recipe(folder / "recipe.yaml", content)
    assert main(["run", str(folder / "recipe.yaml"), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    """A copy of the world with the same raw files and times."""
    shutil.copytree(world / "out", tmp_path / "out")
    shutil.copytree(world / "raw", tmp_path / "raw")  # copy2: with times
    content = recipe_dict(tmp_path / "raw", tmp_path / "out") | {"max_bad_fraction": 0.9}
    del content["packs"]["eval"]
    write_recipe(tmp_path / "recipe.yaml", content)
    return tmp_path


def ledger_of(folder: Path) -> EventLedger:
    return EventLedger(folder / "out" / EVENTS_FILE)


def run(folder: Path, *flags: str, step: str = "run") -> int:
    return main([step, str(folder / "recipe.yaml"), "--workers", "1", *flags])


def test_rejected_samples_are_events_by_corpus_and_reason_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in ledger_of(folder).path.read_text().splitlines()]
    assert all(line["code"] in EVENTS and line["count"] > 0 and line["time"] > 0 for line in lines)
    reasons = {(line["code"], line["reason"]) for line in lines if "reason" in line}
    assert reasons >= {("sample-rejected", "empty-text"), ("raw-file-damaged", "damaged-tar")}
    before = ledger_of(folder).path.read_bytes()
    assert run(folder) == 0
    printed = capsys.readouterr().out
    assert ledger_of(folder).path.read_bytes() == before, "a state that lasts is recorded once"
    assert "events: " in printed and "sample-rejected" in printed and EVENTS_FILE in printed


@pytest.mark.parametrize("step", ["ingest", "plan", "materialize", "run"])
def test_strict_makes_events_fatal_also_when_nothing_is_left_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    assert run(folder, "--strict", "sample-rejected,plan-rebuilt", step=step) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mma-prep: sample-rejected: ") and captured.err.count("\n") == 1
    assert run(folder, "--strict", "plan-rebuilt,shard-rebuilt", step=step) == 0


def touch(folder: Path, pattern: str) -> None:
    for path in (folder / "raw").glob(pattern):
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_copied_raw_data_is_named_with_the_way_to_restore_its_times(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(folder, "captions/*.tar")
    before = tree_hashes(folder / "out")
    assert run(folder, "--strict", "raw-file-changed") == 2, "stopped before anything is read again"
    assert "raw-file-changed" in capsys.readouterr().err
    assert run(folder) == 0
    printed = capsys.readouterr().out
    assert "corpora.captions: 3 of 3 raw files changed since they were ingested and are read again" in printed
    assert "captions/00000.tar (same size, other modification time)" in printed
    assert "identified by name, size and modification time" in printed and "rsync -a --size-only" in printed
    assert ledger_of(folder).summary()["raw-file-changed"] == 6
    assert tree_hashes(folder / "out") == before
    assert run(folder) == 0 and "changed since" not in capsys.readouterr().out


def test_raw_files_of_another_size_are_no_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(folder / "raw" / "captions" / "00000.tar", {"more": (png(77), "a new caption")})
    assert run(folder) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 raw files changed" in printed and "rsync" not in printed


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("ingest/captions/*/*.json", "shard-rebuilt"),
        ("ingest/talk/*/*.sources", "shard-rebuilt"),
        ("packs/sft/plan.arrow", "plan-rebuilt"),
        ("packs/sft/.work/rows-*.json", "packs-rebuilt"),
        ("images/*/store.json", "store-damaged"),
        ("tokenizer/mma_tokenizer.json", "tokenizer-rebuilt"),
    ],
)
def test_a_damaged_file_is_rebuilt_to_the_same_bytes_and_recorded(folder: Path, pattern: str, code: str) -> None:
    before = tree_hashes(folder / "out")
    damage(next(iter(sorted((folder / "out").glob(pattern)))))
    assert run(folder, "--strict", code) == 2
    assert run(folder) == 0
    assert tree_hashes(folder / "out") == before
    assert ledger_of(folder).summary()[code] >= 1


def test_changed_images_are_recorded_by_shard(folder: Path) -> None:
    touch(folder, "images/1.png")
    assert run(folder) == 0
    assert ledger_of(folder).summary()["image-file-changed"] >= 1
