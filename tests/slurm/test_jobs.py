"""The job scripts on a real Slurm of two nodes: gloo ranks on both, small models, few steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.pipeline.evaluation.official import write_all
from tests.pipeline.serving.helpers import make_export
from tests.pipeline.training.runs import TINY, curve, metrics, train
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow

STEPS = "40"
BATCH = ["--train.global-batch-size", "4", "--checkpoint.every-steps", "5"]
FLAGS = " ".join([*TINY, *BATCH])
QUICK = {"RANKS_PER_NODE": "1", "CHECK_NODES": "no", "EXTRA_FLAGS": f"{FLAGS} --train.steps 3"}
LONG = {**QUICK, "PT_RUN_DIR": "none", "EXTRA_FLAGS": f"{FLAGS} --train.steps {STEPS}"}
TWO_NODES = ["--nodes=2", "--gpus-per-node=2"]


def reach(slurm: Cluster, run: Path, step: int) -> None:
    slurm.until(lambda: len(metrics(run)) >= step, 400, f"step {step} of {run.name}")


@pytest.fixture(scope="module")
def undisturbed(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the jobs train, without interruptions."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(small_demo, run, *BATCH, "--train.steps", STEPS).check()
    return run


@pytest.fixture(scope="module")
def limited(slurm: Cluster) -> str:
    """A job on two checked nodes whose ranks are stopped until its time limit, while other tests run."""
    limits = ["--time=10", "--signal=B:USR1@555"]  # it comes 15 to 45 s after the start
    env = {**LONG, "RUN_DIR": "runs/limited", "CHECK_NODES": "yes"}
    job = slurm.submit(*TWO_NODES, *limits, "slurm/sft_mma.sh", env=env)
    reach(slurm, slurm.work / "runs/limited", 2)
    slurm.call("scancel", "--signal=STOP", job)
    return job


@pytest.mark.parametrize("script", ["data_prep.sh", "pt.sh", "sft_mma.sh", "evaluate.sh", "study.sh"])
def test_slurm_accepts_the_request(slurm: Cluster, script: str) -> None:
    done = slurm.call("sbatch", "--test-only", f"slurm/{script}")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("limited")
def test_the_chain_ends_with_measured_models(slurm: Cluster) -> None:
    flags = {"DATA_FLAGS": "--scenes 300 --held-out 12", "EVAL_FLAGS": "--limit 4", "TRAIN_SBATCH": " ".join(TWO_NODES)}
    flags["SBATCH_EXPORT"] = "NONE"  # as some sites set it
    done = slurm.call("slurm/chain.sh", "--policies", "mma,causal", env={**QUICK, **flags})
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED"] * 5, slurm.logs()
    runs = slurm.work / "runs"
    names = ["demo_pt", "demo_sft", "demo_sft_causal"]
    assert [len(metrics(runs / name)) for name in names] == [3, 3, 3]
    assert all("starting from the weights of runs/demo_pt" in slurm.log(job) for job in jobs[2:4])
    assert all((runs / name / "export/config.json").is_file() for name in names[1:])
    assert (runs / "demo_sft/evaluation_beside_demo_sft_causal.json").is_file()
    again = slurm.submit("--gpus-per-node=2", "slurm/pt.sh", env=QUICK)
    assert slurm.wait(again) == "COMPLETED"
    assert "runs/demo_pt is finished (step 3): nothing to do" in slurm.log(again)


def test_an_array_answers_a_benchmark_and_its_table_is_written(slurm: Cluster) -> None:
    """The run is finished and exported, so the chain has only the benchmark's three jobs to do."""
    run, data = slurm.work / "runs/benched", write_all(slurm.work / "bench_data")
    run.mkdir(parents=True)
    make_export(run, max_position_embeddings=2048)
    (run / "status.json").write_text(json.dumps({"state": "done", "step": 0}))
    shutil.copy(ROOT / "pipeline/recipes/demo_sft.yaml", slurm.work / "benched.yaml")
    stages = ["--data", "none", "--pt", "none", "--sft", "benched.yaml", "--eval", "none"]
    bench = ["--bench", "pope", "--bench-data", data.name, "--bench-shards", "2"]
    env = {"BENCH_FLAGS": "--max-new-tokens 2 --device cpu"}
    done = slurm.call("slurm/chain.sh", *stages, *bench, env=env)
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[0] for line in done.stdout.splitlines() if line[0].isdecimal()]
    assert [slurm.wait(job) for job in (jobs[0], jobs[2])] == ["COMPLETED"] * 2, slurm.logs()
    answers = [run / f"export/bench/pope/answers-0000{share}-of-00002.jsonl" for share in (0, 1)]
    assert all(len(path.read_text().splitlines()) > 1 for path in answers)
    questions = sum(len(path.read_text().splitlines()) - 1 for path in answers)
    assert questions == len((run / "export/bench/pope/graded.jsonl").read_text().splitlines())
    table = (run / "bench.txt").read_text()
    assert "pope" in table and table in slurm.log(jobs[2])


def test_the_work_of_a_killed_array_task_is_redone(slurm: Cluster) -> None:
    """Data preparation of the chain: one task dies while it writes a shard; the same command makes the same packs."""
    shutil.copy(ROOT / "data_prep/recipes/demo.yaml", slurm.work / "shared.yaml")
    command = ["slurm/chain.sh", "--data", "shared.yaml", "--shards", "3", "--pt", "none", "--sft", "none"]
    env = {"DEMO_OUT": "data/shared", "DATA_FLAGS": "--workers 1"}
    array, rest = (line.split()[0] for line in slurm.call(*command, env=env).stdout.splitlines()[:-1])
    half = kill_in_a_shard(slurm, slurm.work / "data/shared/ingest")
    assert slurm.wait(rest) == "CANCELLED"
    states = sorted(slurm.call("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%T").stdout.split())
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    shard = half.name[1:].rsplit(".", 3)[0]  # of .SHARD.arrow.TOKEN.tmp
    assert half.exists() and not half.with_name(f"{shard}.json").exists()
    array, rest = (line.split()[0] for line in slurm.call(*command, env=env).stdout.splitlines()[:-1])
    assert slurm.wait(rest) == "COMPLETED", slurm.logs()
    names = ["pt", "sft", "eval"]
    made, known = (
        [(slurm.work / "data" / out / "packs" / name / "manifest.json").read_bytes() for name in names]
        for out in ("shared", "demo")
    )
    assert made == known


def writers(path: Path) -> list[int]:
    """Processes that have a file open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ends meanwhile
            if any(link.readlink() == path for link in (entry / "fd").iterdir()):
                found.append(int(entry.name))
    return found


def kill_in_a_shard(slurm: Cluster, ingest: Path) -> Path:
    """Kill -9 a process that has just begun to write a shard; return its temporary file."""
    caught: list[Path] = []

    def catch() -> bool:
        for path in ingest.rglob(".*.arrow.*.tmp"):
            for pid in writers(path):
                with suppress(ProcessLookupError):  # it was writing its last shard
                    os.kill(pid, signal.SIGSTOP)
                    if path.exists():
                        os.kill(pid, signal.SIGKILL)
                        caught.append(path)
                        return True
                    os.kill(pid, signal.SIGCONT)
        return False

    slurm.until(catch, 60, "a half-written shard", every_s=0.002)
    return caught[0]


def test_the_time_limit_is_survived(slurm: Cluster, limited: str, undisturbed: Path) -> None:
    """A real time limit; Slurm counts in minutes."""
    run = slurm.work / "runs/limited"
    slurm.until(lambda: "USR1 from Slurm" in slurm.log(limited), 120, "the time limit")
    slurm.call("scancel", "--signal=CONT", limited)
    slurm.until(lambda: "requeued" in slurm.log(limited), 240, "the job to be requeued")
    slurm.call("scontrol", "update", f"job={limited}", "TimeLimit=60")
    assert slurm.wait(limited) == "COMPLETED", slurm.logs()
    assert slurm.log(limited).count("network: 2 nodes passed") == 2
    assert "the time limit is near; saved at step" in slurm.log(limited)
    assert f"resuming from {run.relative_to(slurm.work)}" in slurm.log(limited)
    assert curve(run) == curve(undisturbed)


def test_a_lost_node_is_survived(slurm: Cluster, undisturbed: Path) -> None:
    """A power cut: the other rank waits until Slurm notices the lost node."""
    run = slurm.work / "runs/struck"
    job = slurm.submit(*TWO_NODES, "slurm/sft_mma.sh", env={**LONG, "RUN_DIR": "runs/struck"})
    reach(slurm, run, 8)
    slurm.call("scancel", "--signal=STOP", job)  # otherwise it would notice the closed connection
    with slurm.missing_nodes_after(4):
        slurm.kill_node(NODES[1])
        slurm.until(lambda: slurm.state(job) == "PENDING", 90, "the job to be requeued")
        slurm.until(lambda: "ended by Slurm" in slurm.log(job), 30, "the job script to see why")
    slurm.start_node(NODES[1])
    assert slurm.wait(job) == "COMPLETED", slurm.logs()
    assert f"ended by Slurm: lost {NODES[1]}" in slurm.log(job)
    assert "resuming from runs/struck/checkpoints/step-" in slurm.log(job)
    assert curve(run) == curve(undisturbed)


def test_a_failed_pt_cancels_what_waits_for_it(slurm: Cluster) -> None:
    stages = ["--data", "none", "--pt", "nlvr_pt", "--sft", "nlvr_sft"]  # no run of another test's chain
    done = slurm.call("slurm/chain.sh", *stages, env={**QUICK, "EXTRA_FLAGS": "--frob 1"})
    pt, sft, evaluation = (line.split()[0] for line in done.stdout.splitlines()[:-1])
    assert [slurm.wait(job) for job in (pt, sft, evaluation)] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "unknown flag '--frob'" in slurm.log(pt)


def test_sft_alone_reports_a_missing_pt_run(slurm: Cluster) -> None:
    job = slurm.submit("slurm/sft_mma.sh", env={**QUICK, "PT_RUN_DIR": "runs/nowhere"})
    assert slurm.wait(job) == "FAILED"
    assert slurm.log(job).startswith("error: PT_RUN_DIR=runs/nowhere does not exist: train it first")
    assert "ExitCode=2:0" in slurm.call("scontrol", "show", "job", job).stdout
