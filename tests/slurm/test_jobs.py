"""The job scripts on a real Slurm of two nodes: gloo ranks on both, small models, few steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.pipeline.training.runs import TINY, curve, metrics
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow

STEPS = 60
BATCH = ["--train.batch-packs", "4", "--checkpoint.every-steps", "5"]
FLAGS = " ".join([*TINY, *BATCH])
QUICK = {"RANKS_PER_NODE": "1", "CHECK_NODES": "no", "EXTRA_FLAGS": f"{FLAGS} --train.steps 3"}
LONG = {**QUICK, "PT_RUN_DIR": "none", "EXTRA_FLAGS": f"{FLAGS} --train.steps {STEPS}"}


def reach(slurm: Cluster, run: Path, step: int) -> None:
    slurm.until(lambda: len(metrics(run)) >= step, 90, f"step {step} of {run.name}")


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster) -> Path:
    """A run of both nodes that nothing disturbed; its nodes were checked first."""
    env = {**LONG, "RUN_DIR": "runs/undisturbed", "CHECK_NODES": "yes"}
    job = slurm.submit("--nodes=2", "slurm/sft_mma.sh", env=env)
    assert slurm.wait(job) == "COMPLETED", slurm.logs()
    assert "network: 2 nodes are fit" in slurm.log(job)
    return slurm.work / "runs/undisturbed"


@pytest.mark.parametrize("script", ["data_prep.sh", "pt.sh", "sft_mma.sh", "evaluate.sh"])
def test_slurm_takes_the_request(slurm: Cluster, script: str) -> None:
    done = slurm.call("sbatch", "--test-only", f"slurm/{script}")
    assert done.returncode == 0, done.stderr


def test_the_chain_ends_with_a_measured_model(slurm: Cluster) -> None:
    flags = {"DATA_FLAGS": "--scenes 300 --held-out 12", "EVAL_FLAGS": "--limit 4", "TRAIN_SBATCH": "--nodes=2"}
    done = slurm.call("slurm/chain.sh", env={**QUICK, **flags})
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED"] * 4, slurm.logs()
    runs = slurm.work / "runs"
    assert [len(metrics(runs / name)) for name in ("demo_pt", "demo_sft")] == [3, 3]
    assert "starting from the weights of runs/demo_pt" in slurm.log(jobs[2])
    assert (runs / "demo_sft/export/config.json").is_file()
    assert (runs / "demo_sft/evaluation.json").is_file()
    again = slurm.submit("slurm/pt.sh", env=QUICK)
    assert slurm.wait(again) == "COMPLETED"
    assert "runs/demo_pt is finished (step 3): nothing to do" in slurm.log(again)


def test_an_array_makes_the_same_packs(slurm: Cluster) -> None:
    shutil.copy(ROOT / "data_prep/recipes/demo.yaml", slurm.work / "shared.yaml")
    env = {"DEMO_OUT": "data/shared", "RECIPE": "shared.yaml", "DATA_FLAGS": "--workers 1"}
    array = slurm.submit("--array=1-3", "slurm/data_prep.sh", env=env)
    rest = slurm.submit(f"--dependency=afterok:{array}", "slurm/data_prep.sh", env=env)
    assert slurm.wait(rest) == "COMPLETED", slurm.logs()
    names = ["pt", "sft", "eval"]
    made, known = (
        [(slurm.work / "data" / out / "packs" / name / "manifest.json").read_bytes() for name in names]
        for out in ("shared", "demo")
    )
    assert made == known


def test_the_time_limit_is_survived(slurm: Cluster, undisturbed: Path) -> None:
    run = slurm.work / "runs/limited"
    job = slurm.submit("--nodes=2", "slurm/sft_mma.sh", env={**LONG, "RUN_DIR": "runs/limited"})
    reach(slurm, run, 2)
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # what --signal does near the time limit
    assert slurm.wait(job) == "COMPLETED", slurm.logs()
    assert "back to the queue: the time limit is near" in slurm.log(job)
    assert f"resuming from {run.relative_to(slurm.work)}" in slurm.log(job)
    assert curve(run) == curve(undisturbed)


def test_a_lost_node_is_survived(slurm: Cluster, undisturbed: Path) -> None:
    run = slurm.work / "runs/struck"
    job = slurm.submit("--nodes=2", "slurm/sft_mma.sh", env={**LONG, "RUN_DIR": "runs/struck"})
    reach(slurm, run, 8)
    slurm.kill_node(NODES[1])
    slurm.until(lambda: slurm.state(job) == "PENDING", 90, "the job to go back to the queue")
    slurm.start_node(NODES[1])
    assert slurm.wait(job) == "COMPLETED", slurm.logs()
    assert "resuming from runs/struck/checkpoints/step-" in slurm.log(job)
    assert curve(run) == curve(undisturbed)


def test_a_run_that_the_user_stops_stays_stopped(slurm: Cluster) -> None:
    run = slurm.work / "runs/halted"
    job = slurm.submit("slurm/sft_mma.sh", env={**LONG, "RUN_DIR": "runs/halted"})
    reach(slurm, run, 1)
    (run / "STOP").touch()
    assert slurm.wait(job) == "FAILED"
    assert "stopped by a STOP file" in slurm.log(job)
    tuned = slurm.submit("slurm/sft_mma.sh", env={**QUICK, "PT_RUN_DIR": "runs/halted"})
    assert slurm.wait(tuned) == "FAILED"
    assert "PT_RUN_DIR=runs/halted is not finished (stopped at step " in slurm.log(tuned)


def test_a_failed_pt_cancels_what_waits_for_it(slurm: Cluster) -> None:
    done = slurm.call("slurm/chain.sh", "--data", "none", "--pt", "nlvr_pt", env={**QUICK, "EXTRA_FLAGS": "--frob 1"})
    pt, sft, evaluation = (line.split()[0] for line in done.stdout.splitlines()[:-1])
    assert [slurm.wait(job) for job in (pt, sft, evaluation)] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "unknown flag '--frob'" in slurm.log(pt)


def test_sft_alone_says_what_is_missing(slurm: Cluster) -> None:
    job = slurm.submit("slurm/sft_mma.sh", env={**QUICK, "PT_RUN_DIR": "runs/nowhere"})
    assert slurm.wait(job) == "FAILED"
    assert slurm.log(job).startswith("error: PT_RUN_DIR=runs/nowhere does not exist: train it first")
    assert "ExitCode=2:0" in slurm.call("scontrol", "show", "job", job).stdout
