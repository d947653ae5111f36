"""Faults on one rank of a 2 x 2 grid under the real trainer: what the other ranks do, and what is left behind."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from data_prep.common.events import EVENTS_FILE, EventLedger
from pipeline.checkpoints.checkpoint import checkpoint_folders, open_checkpoint
from tests.launch import ROOT, Finished, Job, Launcher, kill, run, session_processes, start
from tests.pipeline.training.runs import STEPS, curve, flags, metrics, same_bits, wait_for_step, weights

pytestmark = pytest.mark.slow
RANKS, TIMEOUT_S = 4, 20
SCRIPT = ROOT / "tests/pipeline/parallel/failing_train.py"
GRID = ["--parallel.pp", "2", "--parallel.micro-batches", "3", "--parallel.timeout-s", str(TIMEOUT_S)]
OPTIMIZER, ALL = "zero3_offload", "zero3_offload_params"
"""What is in host memory: a run that goes on must find it as it was."""


def start_training(demo: Path, run_dir: Path, *fault: str, launcher: Launcher) -> Job:
    """Start a run with a fault on the grid."""
    words = flags(demo, run_dir, *GRID)
    return start(RANKS, SCRIPT, *fault, *words, env={"PYTHONPATH": str(ROOT)}, launcher=launcher)


def train(demo: Path, run_dir: Path, *fault: str, config: str = "zero3", launcher: Launcher = "srun") -> Finished:
    """Train on the grid under a file of ds_configs; ``fault`` is FAULT RANK STEP, or nothing for a sound run."""
    words = flags(demo, run_dir, *GRID, "--deepspeed", str(ROOT / f"ds_configs/{config}.json"))
    script = SCRIPT if fault else ROOT / "pipeline/train.py"
    return run(
        RANKS, script, *fault, *words, env={"PYTHONPATH": str(ROOT)}, timeout_s=TIMEOUT_S + 160, launcher=launcher
    )


@pytest.fixture(scope="module")
def undisturbed(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a sound run under a file of ds_configs."""

    @cache
    def trained(config: str) -> Path:
        run_dir = tmp_path_factory.mktemp(config) / "run"
        train(small_demo, run_dir, config=config).check()
        return run_dir

    return trained


def test_a_gradient_that_is_not_a_number_is_reported_and_skipped(
    small_demo: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    output = train(small_demo, tmp_path / "run", "not-a-number", "3", "3", config=OPTIMIZER).check().output
    assert "step 3: gradient not finite, update skipped on all ranks (rows 24..35: " in output
    lines = metrics(tmp_path / "run")
    assert [line["applied"] for line in lines] == [step != 3 for step in range(1, STEPS + 1)]
    assert lines[2]["grad_norm"] is None
    assert curve(tmp_path / "run")[:2] == curve(undisturbed(OPTIMIZER))[:2]
    assert lines[3]["loss"] != metrics(undisturbed(OPTIMIZER))[3]["loss"], (
        "the step after trains from the weights before"
    )
    manifest = open_checkpoint(tmp_path / "run").manifest
    assert (manifest.step, manifest.optimizer_steps) == (STEPS, STEPS - 1)


def assert_killed(ended: Finished, run_dir: Path, said: str) -> None:
    """A killed rank ends the job, is named once, and leaves only whole checkpoints."""
    assert ended.code != 0
    assert len(re.findall(rf"^error: {said}", ended.output, re.MULTILINE)) == 1, ended.output
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed" and re.match(said, status["error"])
    assert [folder.name for folder in checkpoint_folders(run_dir)] == ["step-00000002"]
    assert open_checkpoint(run_dir).faults() == []


@pytest.mark.parametrize(("rank", "launcher"), [("1", "deepspeed"), ("0", "srun")])
def test_a_rank_killed_in_a_step_ends_the_job(rank: str, launcher: Launcher, small_demo: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = train(small_demo, run_dir, "killed-in-step", rank, "4", launcher=launcher)
    assert_killed(ended, run_dir, rf"rank {rank} \(stage 0, dp rank {rank}; .*\) died: killed")


def test_after_a_rank_killed_in_a_save_the_same_command_goes_on_to_the_bit(
    small_demo: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """The next start takes no notice of half a checkpoint."""
    run_dir = tmp_path / "run"
    ended = train(small_demo, run_dir, "killed-in-save", "2", "4", config=OPTIMIZER)
    assert_killed(ended, run_dir, r"rank 2 \(stage 1, dp rank 0; .*\) died: killed")
    assert list((run_dir / "checkpoints").glob(".step-00000004*.tmp/rank-00002*"))
    assert f"(step 2/{STEPS})" in train(small_demo, run_dir, config=OPTIMIZER).check().output
    assert curve(run_dir) == curve(undisturbed(OPTIMIZER))
    assert same_bits(weights(run_dir), weights(undisturbed(OPTIMIZER)))


def test_a_rank_that_hangs_is_named_and_the_same_command_goes_on_to_the_bit(
    small_demo: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = train(small_demo, run_dir, "hangs", "1", "4", config=ALL)
    assert ended.code != 0
    assert f"error: no rank made progress for {TIMEOUT_S} s (parallel.timeout_s) at step 4: rank 1 " in ended.output
    assert re.search(r"hangs in forward of micro-batch 1 \(failing_train.py:\d+ in asleep\)", ended.output)
    assert "rank 3: waiting for rank 1: hidden states of micro-batch 1" in ended.output
    assert "in asleep" in (run_dir / "logs/rank-1.log").read_text(), "the stacks are in its log"
    assert EventLedger(run_dir / EVENTS_FILE).summary()["run-failed"] == 1
    assert f"(step 2/{STEPS})" in train(small_demo, run_dir, config=ALL).check().output
    assert curve(run_dir) == curve(undisturbed(ALL))
    assert same_bits(weights(run_dir), weights(undisturbed(ALL)))


def processes_left(job: Job) -> Sequence[int]:
    """Return the processes of a job that are still there a moment after its end."""
    deadline = time.monotonic() + 10
    while session_processes(job.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return session_processes(job.pid)


@pytest.mark.parametrize(("fault", "launcher"), [("stopped", "deepspeed"), ("stuck", "srun")])
def test_a_hung_rank_0_is_named_in_time_and_killed(
    fault: str, launcher: Launcher, small_demo: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = start_training(small_demo, run_dir, fault, "0", "4", launcher=launcher)
    try:
        wait_for_step(run_dir, 3, 600)
        began = time.monotonic()
        output, _ = job.communicate(timeout=TIMEOUT_S + 60)
        took = time.monotonic() - began
        left = processes_left(job)
    finally:
        kill(job)
    assert job.returncode != 0
    assert len(re.findall(r"^error: no heartbeat of rank 0: rank 0 \(stage 0, dp rank 0; host ", output, re.M)) == 1, (
        output
    )
    assert "has been silent for" in output and "the same command resumes from" in output
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed" and status["error"].startswith("no heartbeat of rank 0: ")
    assert took < TIMEOUT_S + 15, "the rest of step 3, the limit and a margin"
    assert not left, "all processes are gone"
    assert ("in doing" in (run_dir / "logs/rank-0.log").read_text()) == (fault == "stuck"), "stacks of C code's caller"


def test_an_unexpected_error_of_one_rank_is_one_line_and_a_traceback_in_its_log(
    small_demo: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = train(small_demo, run_dir, "fails", "2", "2")
    log = run_dir / "logs/rank-2.log"
    assert ended.code == 1 and "Traceback" not in ended.output
    (line,) = re.findall("^error: .*", ended.output, re.MULTILINE)
    assert line.startswith("error: rank 2 (stage 1, dp rank 0; host ")
    assert line.endswith(f"step 2: ZeroDivisionError: a bug of this rank; traceback: {log}")
    assert "Traceback" in log.read_text() and "in two lines" in log.read_text()
    assert "Traceback" not in (run_dir / "logs/rank-1.log").read_text()
