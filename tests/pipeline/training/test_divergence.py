"""A run that diverges fails; its last healthy checkpoint stays, and the old command continues to the bit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from data_prep.common.events import EVENTS_FILE, EventLedger
from pipeline.checkpoints.checkpoint import checkpoint_folders, set_aside_unproven
from pipeline.checkpoints.shards import first_not_finite, shards
from pipeline.train import main
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.run.folder import RunFolder
from tests.pipeline.training.runs import curve, flags, same_bits, train, weights


@pytest.mark.parametrize(
    ("value", "place"),
    [(math.nan, 0), (math.inf, 6), (-math.inf, 3), (1e30, 2)],
)
def test_one_value_that_is_not_finite_is_found(value: float, place: int) -> None:
    saved = {"master|v": torch.ones(4), "frozen|w": torch.ones(7, dtype=torch.bfloat16), "exp_avg|e": torch.ones(0)}
    assert first_not_finite(saved) is None
    saved["frozen|w"][place] = value
    assert first_not_finite(saved) == "frozen|w"


@pytest.mark.parametrize(("dp_rank", "kept"), [(0, 3), (1, 3), (2, 1), (3, 0)])
def test_padding_of_a_shard_is_cleared_before_it_is_judged(dp_rank: int, kept: int) -> None:
    """DeepSpeed pads 7 elements to 4 shards of 3 and leaves the rest uninitialized: it may hold anything."""
    shard = torch.full((3,), math.nan)
    shard[:kept] = 1.0
    stage = SimpleNamespace(
        topology=SimpleNamespace(dp_rank=dp_rank), trainable=lambda: (), frozen=lambda: [("w", None)],
        full_shape=lambda param: torch.Size([7]), compute_shard=lambda param: shard,
    )  # fmt: skip
    found = dict(shards(cast("Any", stage)))
    assert first_not_finite(found) is None
    assert found["frozen|w"].tolist() == [1.0] * kept + [0.0] * (3 - kept)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.lr", "inf"], "train.lr: Input should be a finite number"),
        (["--train.lr", "nan"], "train.lr"),
        (["--train.min-lr", "nan"], "train.min_lr"),
        (["--train.weight-decay", "1e9"], "train.weight_decay: Input should be less than or equal to 100"),
        (["--train.eps", "inf"], "train.eps"),
        (["--train.clip-norm", ".inf"], "train.clip_norm"),
        (["--train.steps", "9" * 30], "train.steps"),
        (["--parallel.timeout-s", "99999999999"], "parallel.timeout_s"),
        (["--data.decode-threads", "1000000"], "data.decode_threads"),
    ],
)
def test_absurd_numbers_are_refused(
    words: list[str], said: str, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(small_demo, tmp_path / "run"), *words]) == 2
    text = capsys.readouterr().err.strip()
    assert said in text and "\n" not in text
    assert not (tmp_path / "run").exists()


class Saves:
    """A manager that only notes its saves."""

    def __init__(self, tmp_path: Path, *, every: int = 2, resumed: int = 0) -> None:
        self.saved: list[int] = []
        self.recorded: list[str] = []
        manager = cast(Any, CheckpointManager.__new__(CheckpointManager))
        config = SimpleNamespace(checkpoint=SimpleNamespace(every_steps=every, keep_last=1, keep_every=0))
        manager._plan, manager._unpruned, manager._due = SimpleNamespace(config=config), None, False
        manager._newest, manager._proven, manager._is_rank0 = resumed, resumed - 1, True
        manager._folder = SimpleNamespace(path=tmp_path, record=lambda code, **_: self.recorded.append(code))
        manager.save = self.save
        self.manager: CheckpointManager = manager

    def save(self, step: int) -> None:
        self.saved.append(step)
        cast(Any, self.manager)._due = False

    def run(self, steps: str) -> None:
        """Show steps 1, 2, ...: ``.`` is healthy, ``x`` was skipped."""
        for step, kind in enumerate(steps, start=1):
            self.manager.after_step(step, healthy=kind == ".", stop=False)


@pytest.mark.parametrize(
    ("steps", "saved", "proven"),
    [("....", [2, 4], 3), (".x..", [3, 4], 3), (".xx.", [4], 3), (".xxxx", [], 0), ("..xxx", [2], 1)],
)
def test_only_healthy_steps_are_saved(steps: str, saved: list[int], proven: int, tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.run(steps)
    assert saves.saved == saved and cast(Any, saves.manager)._proven == proven
    assert set(saves.recorded) <= {"checkpoint-unhealthy"}


def test_what_no_later_step_proves_is_set_aside_but_never_the_only_one(tmp_path: Path) -> None:
    for step in (10, 12):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    assert [folder.name for folder in set_aside_unproven(tmp_path, 11)] == ["step-00000012"]
    assert set_aside_unproven(tmp_path, 9) == []
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["diverged-step-00000012", "step-00000010"]


@pytest.mark.slow
def test_a_diverged_run_fails_and_the_old_rate_continues_to_the_bit(small_demo: Path, tmp_path: Path) -> None:
    """The rate is 1e30 from step 12 on, in a copy of a run that was saved after step 11; only one is to be kept."""
    words = ["--train.steps", "15", "--checkpoint.every-steps", "11", "--checkpoint.keep-last", "1"]
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    train(small_demo, undisturbed, *words, "--checkpoint.keep-last", "2").check()
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000015")
    absurd = [*words, "--train.lr", "1e30", "--checkpoint.every-steps", "1"]
    refused = train(small_demo, run_dir, *absurd)
    assert refused.code == 2 and "add --allow-change train.lr" in refused.output
    diverged = train(small_demo, run_dir, *absurd, "--allow-change", "train.lr")
    assert diverged.code == 2 and "Traceback" not in diverged.output, diverged.output
    assert "step-00000012 is not saved: " in diverged.output and "is not finite" in diverged.output
    status = RunFolder(str(run_dir)).status()
    assert (status["state"], status["reason"]) == ("failed", "diverged")
    assert [folder.name for folder in checkpoint_folders(run_dir)] == ["step-00000011"]
    counts = EventLedger(run_dir / EVENTS_FILE).summary()
    assert counts["setting-changed"] == 1 == counts["checkpoint-unhealthy"] and counts["run-failed"] == 1, counts
    late = train(small_demo, run_dir, *words, "--train.lr", "1e30", "--allow-change", "train.lr")
    assert late.code == 2 and "the last 3 steps, up to 15, were skipped" in late.output, late.output
    assert RunFolder(str(run_dir)).status()["reason"] == "diverged"
    assert [folder.name for folder in checkpoint_folders(run_dir)] == ["step-00000011"]
    assert "(step 11/15)" in train(small_demo, run_dir, *words).check().output
    assert "reason" not in RunFolder(str(run_dir)).status(), "the reason was that of an earlier start"
    assert curve(run_dir) == curve(undisturbed)
    assert same_bits(weights(run_dir), weights(undisturbed))
