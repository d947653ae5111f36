"""Every way a training job can end or be requeued, on a real Slurm with a stand-in for the trainer."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import BIN, ROOT
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow

QUICK = {"RANKS_PER_NODE": "1", "CHECK_NODES": "no", "PT_RUN_DIR": "none"}
PLAYS = {
    "restarts": {"EXTRA_FLAGS": "--play limit", "MAX_RESTARTS": "1"},
    "fruitless": {"EXTRA_FLAGS": "--play limit --gain 0"},
    "struck": {"EXTRA_FLAGS": "--play struck --gain 0"},
    "user": {"EXTRA_FLAGS": "--play user"},
    "crash": {"EXTRA_FLAGS": "--play crash", "RANKS_PER_NODE": "2"},
}


@pytest.fixture(scope="module")
def stage(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, used from a folder whose trainer is the stand-in."""
    work = tmp_path_factory.mktemp("stage")
    shutil.copytree(ROOT / "slurm", work / "slurm", ignore=shutil.ignore_patterns("*.log"))
    (work / "pipeline").mkdir()
    (work / "pipeline/__init__.py").touch()  # python -m pipeline.train finds it before the real one
    shutil.copy(ROOT / "tests/slurm/stand_in.py", work / "pipeline/train.py")
    return dataclasses.replace(slurm, work=work)


@pytest.fixture(scope="module")
def played(stage: Cluster) -> dict[str, str]:
    """One job per play, submitted together: they spend most of their time in the queue."""
    return {
        name: stage.submit("--gpus-per-node=2", "slurm/sft_mma.sh", env={**QUICK, **play, "RUN_DIR": f"runs/{name}"})
        for name, play in PLAYS.items()
    }


def test_restarts_are_counted(stage: Cluster, played: dict[str, str]) -> None:
    job = played["restarts"]
    assert stage.wait(job) == "FAILED"
    log = stage.log(job)
    assert "start 1: runs/restarts" in log and "start 2: runs/restarts" in log and "start 3" not in log
    assert "the time limit is near; saved at step 1" in log
    assert "error: MAX_RESTARTS=1 is reached: sbatch again to continue" in log


@pytest.mark.parametrize("play", ["fruitless", "struck"])
def test_a_job_gives_up_after_two_starts_without_a_new_step(stage: Cluster, played: dict[str, str], play: str) -> None:
    job = played[play]
    assert stage.wait(job) == "FAILED"
    log = stage.log(job)
    assert log.count("from step 0, weights of nothing") == 2
    assert f"error: two consecutive starts of job {job} saved nothing after step 0, so it is not requeued" in log
    if play == "struck":
        assert "ended by Slurm: preempted, cancelled or out of time" in log


def test_a_run_that_the_user_stops_stays_stopped(stage: Cluster, played: dict[str, str]) -> None:
    assert stage.wait(played["user"]) == "FAILED"
    assert "stopped by a STOP file" in stage.log(played["user"])
    tuned = stage.submit("slurm/sft_mma.sh", env={**QUICK, "PT_RUN_DIR": "runs/user"})
    assert stage.wait(tuned) == "FAILED"
    assert "PT_RUN_DIR=runs/user is not finished (stopped at step 1)" in stage.log(tuned)


def test_a_failed_rank_can_be_found(stage: Cluster, played: dict[str, str]) -> None:
    job = played["crash"]
    assert stage.wait(job) == "FAILED"
    lines = stage.log(job).splitlines()
    assert "1: rank one is out of memory" in lines
    assert lines[-2].endswith("failed; every node responds, so a restart would fail too: rank 1 is gone")
    (path,) = (stage.work / "slurm/logs").glob(f"*-{job}.log")
    assert lines[-1].endswith(f"output of rank N: grep '^ *N: ' {path}")


@pytest.fixture(scope="module")
def silenced(stage: Cluster) -> str:
    """A requeued job: its trainer failed and a node stopped responding, which Slurm had not noticed."""
    daemon = stage.root / f"run/slurmd.{NODES[1]}.pid"
    env = {**QUICK, "EXTRA_FLAGS": "--play silence", "SILENCED": str(daemon), "NODE_PATIENCE": "3"}
    with stage.missing_nodes_after(300):
        job = stage.submit(
            "--nodes=2", "--gpus-per-node=2", "slurm/sft_mma.sh", env={**env, "RUN_DIR": "runs/silenced"}
        )
        try:
            stage.until(lambda: "requeued" in stage.log(job), 120, "the job to be requeued")
        finally:
            os.kill(int(daemon.read_text()), signal.SIGCONT)
    return job


def test_a_node_that_starts_no_process_counts_as_lost(stage: Cluster, silenced: str) -> None:
    assert f"lost {NODES[1]}; resuming from the newest checkpoint" in stage.log(silenced)


def test_four_stages_of_dual_order_training(stage: Cluster) -> None:
    """A chain fails in its third stage; the same command runs the unfinished stages."""
    names = ["pt_text_first", "pt_image_first", "sft_text_first", "sft_image_first"]
    pt, sft = (",".join(f"{name}.yaml" for name in names if name.startswith(kind)) for kind in ("pt", "sft"))
    command = ["slurm/chain.sh", "--data", "none", "--pt", pt, "--sft", sft, "--eval", "none"]
    (stage.work / "runs/sft_text_first").mkdir(parents=True)
    (stage.work / "runs/sft_text_first/slurm_job").mkdir()  # so the run folder cannot be claimed
    first = [line.split()[0] for line in stage.call(*command, env=QUICK).stdout.splitlines()[:-1]]
    states = [stage.wait(job) for job in first]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED", "CANCELLED"]
    assert "RUN_DIR=runs/sft_text_first is not writable" in stage.log(first[2])
    (stage.work / "runs/sft_text_first/slurm_job").rmdir()
    lines = stage.call(*command, env=QUICK).stdout.splitlines()
    assert lines[:2] == [f"- runs/{name} is finished (step 1)" for name in names[:2]]
    second = [line.split()[0] for line in lines[2:4]]
    assert [stage.wait(job) for job in second] == ["COMPLETED"] * 2
    starts = ["nothing", *(f"runs/{name}" for name in names[:3])]
    for job, start in zip([*first[:2], *second], starts, strict=True):
        assert f"0: from step 0, weights of {start}" in stage.log(job)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A folder on a file system of one MiB; None if it cannot be mounted."""
    folder = tmp_path_factory.mktemp("small_disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode
    yield None if mounted else folder
    if not mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def checked(stage: Cluster, small_disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Jobs on two nodes, of which the second is unfit."""
    broken = tmp_path_factory.mktemp("broken") / "python"
    broken.write_text("#!/bin/sh\necho python: cannot open shared object file >&2\nexit 127\n")
    broken.chmod(0o755)
    sick = {
        "python": f"PATH={broken.parent}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "gpus": "CUDA_VISIBLE_DEVICES=0",
        **({"disk": f"TMPDIR={small_disk}"} if small_disk else {}),
    }
    return {
        name: stage.submit(
            "--nodes=2", "--gpus-per-node=2", "slurm/sft_mma.sh",
            env={**QUICK, "CHECK_NODES": "yes", "RUN_DIR": f"runs/{name}", "SICK": what},
        )
        for name, what in sick.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("python", "python slurm/check_nodes.py exits with code 127"),
        ("gpus", "the job has 2 GPUs on the first node, but 1 on this one"),
        ("disk", "has 0.00 GiB free"),
    ],
)
def test_an_unfit_node_is_named(stage: Cluster, checked: dict[str, str], fault: str, words: str) -> None:
    if fault not in checked:
        pytest.skip("a small file system can only be mounted by root")
    job = checked[fault]
    assert stage.wait(job) == "FAILED"
    log = stage.log(job)
    assert f": bad node {NODES[1]}: " in log and words in log
    assert log.count("bad node ") == 1
    assert "error: a node is unfit for training" in log
    assert "from step 0, weights" not in log and "requeued" not in log


def test_a_job_continues_once_its_node_responds_again(stage: Cluster, silenced: str) -> None:
    assert stage.wait(silenced) == "COMPLETED", stage.logs()
    assert "start 2: runs/silenced" in stage.log(silenced)
