"""Checkpoint folders: which are found, kept and refused."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from data_prep.common.errors import UserError
from pipeline.checkpoints import checkpoint, writing
from pipeline.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    hash_file,
    load,
    newest_intact,
    open_checkpoint,
    prune,
    remove_unfinished,
)
from pipeline.checkpoints.manifest import CheckpointManifest, ParamEntry
from pipeline.checkpoints.writing import Target, save_phases
from pipeline.config.schema import RunConfig
from pipeline.training.run.folder import RunFolder


def steps(run_dir: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint_folders(run_dir)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in ("step-00000010", "step-00000020", "step-00000030", ".step-00000040.tmp", "old-step-00000005"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    return tmp_path


def test_only_finished_checkpoints_are_listed(run_dir: Path) -> None:
    assert steps(run_dir) == [30, 20, 10]


@pytest.mark.parametrize(
    ("newest", "keep_last", "keep_every", "proven", "left"),
    [
        pytest.param(30, 2, 0, 30, [30, 20], id="the newest are kept"),
        pytest.param(20, 1, 0, 20, [20], id="a damaged later one does not push out the one just saved"),
        pytest.param(20, 5, 0, 20, [20, 10], id="fewer than asked"),
        pytest.param(30, 1, 10, 30, [30, 20, 10], id="kept for good"),
        pytest.param(30, 1, 20, 30, [30, 20], id="every second for good"),
        pytest.param(20, 1, 30, 20, [20], id="a damaged later one is not kept for good"),
        pytest.param(30, 1, 0, 29, [30, 20], id="the newest proven one is kept"),
        pytest.param(30, 1, 0, 19, [30, 10], id="the newest proven one is kept, however old"),
    ],
)
def test_pruning(newest: int, keep_last: int, keep_every: int, proven: int, left: list[int], run_dir: Path) -> None:
    prune(run_dir, keep_last, newest=run_dir / f"checkpoints/step-{newest:08d}", keep_every=keep_every, proven=proven)
    assert steps(run_dir) == left
    others = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("step-"))
    assert others == [".step-00000040.tmp", "old-step-00000005"], "a save under way is left alone"


def test_a_checkpoint_whose_removal_is_cut_short_is_not_met_under_its_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def cut_short(folder: Path, **_: object) -> None:
        if folder.exists():
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checkpoints.checkpoint.shutil.rmtree", cut_short)
        with pytest.raises(KilledError):
            prune(run_dir, 2, newest=run_dir / "checkpoints/step-00000030", proven=30)
    assert steps(run_dir) == [30, 20] and (run_dir / "checkpoints/.old-step-00000010").exists()
    remove_unfinished(run_dir)
    assert not (run_dir / "checkpoints/.old-step-00000010").exists()


def test_what_interrupted_saves_left_is_removed_at_a_start(run_dir: Path) -> None:
    remove_unfinished(run_dir)
    assert steps(run_dir) == [30, 20, 10]
    assert not (run_dir / "checkpoints/.step-00000040.tmp").exists()
    assert (run_dir / "checkpoints/old-step-00000005").exists()


def test_folders_without_a_manifest_are_complaints(run_dir: Path) -> None:
    found, complaints = newest_intact(run_dir, rank=0, world=1)
    assert found is None and len(complaints) == 3
    with pytest.raises(UserError, match="step-00000030 is not an intact checkpoint"):
        open_checkpoint(run_dir)


def test_a_slice_is_read_from_the_files_that_hold_it_alone(tmp_path: Path) -> None:
    """Of 7 elements on 3 ranks each has 3, the last two of them padding."""
    dp, share, values = 3, 3, torch.arange(1.0, 10.0)
    manifest = CheckpointManifest(
        step=3, optimizer_steps=3, consumed_packs=12, plan_sha256="0", global_batch_size=4, pp=1, dp=dp, config={},
        model={"spec": {"llm": {}}, "tokenizer_sha256": "0"}, params={"w": ParamEntry((7,), 0, True)},
    )  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    target = Target(tmp_path / "step-00000003", "token")
    saves = [
        save_phases({"master|w": part}, target, manifest, rank=rank, tokenizer=tmp_path / "tokenizer")
        for rank, part in enumerate(values.split(share))
    ]
    files = [next(save)() for save in saves]
    saves[0].send(files)()
    assert newest_intact(target.final, rank=0, world=1)[1] == []
    for start, stop in itertools.combinations_with_replacement(range(8), 2):
        opened = Checkpoint(target.final)
        assert opened.read_flat("master", "w", start, stop).tolist() == values[start:stop].tolist()
        assert [*opened._open] == sorted({element // share for element in range(start, stop)})


def test_files_that_rank_0_does_not_see_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose run folders lie on disks of their own."""
    monkeypatch.setattr(writing, "SHOWN_S", 0.0)
    manifest = CheckpointManifest(
        step=3, optimizer_steps=3, consumed_packs=12, plan_sha256="0", global_batch_size=4, pp=1, dp=2, config={},
        model={"spec": {"llm": {}}}, params={"w": ParamEntry((4,), 0, True)},
    )  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    targets = [Target(tmp_path / disk / "step-00000003", "token") for disk in ("a", "b")]
    saves = [
        save_phases({"master|w": torch.ones(2)}, target, manifest, rank=rank, tokenizer=tmp_path / "tokenizer")
        for rank, target in enumerate(targets)
    ]
    files = [next(save)() for save in saves]
    with pytest.raises(OSError, match=r"rank 0 does not see .*rank-00001.safetensors.* shared by all nodes"):
        saves[0].send(files)()
    assert not targets[0].final.exists()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with two whole checkpoints."""
    (tmp_path / "tokenizer").mkdir()
    for step in (1, 2):
        manifest = CheckpointManifest(
            step=step, optimizer_steps=step, consumed_packs=4 * step, plan_sha256="0", global_batch_size=4, pp=1, dp=1,
            config={}, model={"spec": {"llm": {}}}, params={"w": ParamEntry((2,), 0, step == 1)},
        )  # fmt: skip
        target = Target(tmp_path / f"run/checkpoints/step-{step:08d}", "token")
        kind = "master" if step == 1 else "frozen"
        save = save_phases({f"{kind}|w": torch.ones(2)}, target, manifest, rank=0, tokenizer=tmp_path / "tokenizer")
        save.send([next(save)()])()
    return tmp_path / "run"


def test_a_checkpoint_that_cannot_be_read_is_passed_over(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        if "step-00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return hash_file(path)

    monkeypatch.setattr(checkpoint, "hash_file", broken)
    found, complaints = newest_intact(whole, rank=0, world=1)
    assert found is not None and found.manifest.step == 1
    assert all("cannot be read (Input/output error)" in line for line in complaints) and complaints


def test_rank_0_says_which_checkpoints_there_are_and_all_must_see_the_same(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of this rank does not show the newest yet, or shows another."""
    told = checkpoint_folders(whole)
    monkeypatch.setattr(checkpoint, "_broadcast_from_rank0", lambda own: [(folder, True) for folder in told])
    monkeypatch.setattr(checkpoint, "checkpoint_folders", lambda run_dir: told[1:])
    found, _ = newest_intact(whole, rank=1, world=2)
    assert found is not None and found.manifest.step == 2
    views: list[Any] = [([], "another manifest")]
    monkeypatch.setattr(checkpoint, "_all_gather", lambda own: [own, *views])
    found, complaints = newest_intact(whole, rank=1, world=2)
    assert found is None and all("differs between nodes" in line for line in complaints) and len(complaints) == 2


def test_a_frozen_weight_is_not_taken_for_its_moments(whole: Path) -> None:
    """A run that goes on with a tower it had frozen has no moments to go on from."""
    stage = SimpleNamespace(
        trainable=lambda: iter([("w", nn.Parameter(torch.zeros(2)))]), frozen=lambda: iter([]),
        topology=SimpleNamespace(dp_rank=0), full_shape=lambda param: param.shape, compute_shard=lambda param: param,
        master_shard=lambda param, state=None: param.data, finish_load=lambda steps: None,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"w was frozen, .*keep it frozen, or .*--init-from"):
        load(cast(Any, stage), open_checkpoint(whole))
    load(cast(Any, stage), open_checkpoint(whole), weights_only=True)


def test_the_first_failure_stays(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.create()
    folder.record_start(RunConfig(), world=2)
    folder.set_status("running", 7)
    folder.set_failed("row 5 is unreadable")
    folder.set_failed("connection closed", 9)
    assert {key: folder.status()[key] for key in ("state", "step", "error")} == {
        "state": "failed",
        "step": 7,
        "error": "row 5 is unreadable",
    }
    folder.record_start(RunConfig(), world=2)
    folder.set_failed("KeyboardInterrupt")
    assert folder.status()["error"] == "KeyboardInterrupt"


def test_a_rank_that_its_start_left_behind_leaves_the_next_ones_status_alone(tmp_path: Path) -> None:
    def folder(start: int) -> RunFolder:
        made = RunFolder(str(tmp_path / "run"))
        made.create()
        made.start = start
        return made

    orphan, lead, other = folder(1), folder(2), folder(2)
    folder(1).record_start(RunConfig(), world=2)
    orphan.set_failed("rank 0 died")
    assert orphan.status()["error"] == "rank 0 died"
    lead.claim()
    lead.record_start(RunConfig(), world=2)
    orphan.set_failed("connection closed")
    assert lead.status()["state"] == "running"
    other.set_failed("rank 0 died again")
    assert lead.status()["error"] == "rank 0 died again"
    late = folder(0)  # it has not met the others of its start yet
    late.set_failed("no connection")
    assert lead.status()["error"] == "rank 0 died again"
    lead.start = 0
    lead.set_failed("the port is taken")
    assert lead.status()["error"] == "the port is taken", "who holds the folder says what becomes of it"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir .*file cannot be written \(Not a directory\)"):
        RunFolder(str(tmp_path / "file")).create()
