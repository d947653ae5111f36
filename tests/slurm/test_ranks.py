"""Which rank, GPU and run folder each process gets: under Slurm, and without it on several nodes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT, environment, free_port, kill, session_processes
from tests.pipeline.training.runs import flags, metrics
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow

_JOB = """\
#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --output=slurm/logs/ranks-%j.log
. slurm/lib.sh
name_master
launch 2 bash -c 'echo $SLURM_PROCID $SLURM_LOCALID $SLURM_STEP_NUM_TASKS $SLURMD_NODENAME $MASTER_ADDR \
  GPUs $CUDA_VISIBLE_DEVICES ${LOCAL_RANK:+inherited}'
"""


REQUESTS = [
    (8, ["--gpus-per-node=8", "--cpus-per-gpu=2"]),
    (2, ["--gpus-per-node=2", "--ntasks-per-node=2", "--gpus-per-task=1"]),
    (2, ["--gres=gpu:2", "--cpus-per-task=4"]),
]
"""GPUs per node of the job, and the sbatch options that request them."""


def test_every_rank_sees_its_nodes_gpus(slurm: Cluster) -> None:
    """However GPUs are requested, two ranks per node can each use the one of their local rank."""
    (slurm.work / "ranks.sh").write_text(_JOB)
    jobs = [(gpus, slurm.submit(*words, "ranks.sh", env={"LOCAL_RANK": "7"})) for gpus, words in REQUESTS]
    places = [f"{rank}: {rank} {rank % 2} 4 {NODES[rank // 2]} {NODES[0]} GPUs" for rank in range(4)]
    for gpus, job in jobs:
        assert slurm.wait(job) == "COMPLETED", slurm.logs()
        lines = [line.rpartition(" ") for line in sorted(slurm.log(job).splitlines())]
        assert [place for place, _, _ in lines] == places
        assert [len(set(devices.split(","))) for _, _, devices in lines] == [gpus] * 4


def test_a_hostfile_without_slurm_and_ssh(small_demo: Path, tmp_path: Path) -> None:
    """DeepSpeed's own way: the same command on every node, with its node rank; here nodes of one and two ranks."""
    run = tmp_path / "run"
    (tmp_path / "hosts").write_text("".join(f"{node} slots={ranks}\n" for ranks, node in enumerate(NODES, 1)))
    port = str(free_port())
    logs = [tmp_path / f"node-{number}.log" for number in range(2)]
    nodes = [
        subprocess.Popen(
            [
                "deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", str(number),
                "--master_addr", "127.0.0.1", "--master_port", port,
                str(ROOT / "pipeline/train.py"), *flags(small_demo, run, "--train.steps", "3"),
            ],
            cwd=tmp_path, env=environment(), stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )
        for number, log in enumerate(logs)
    ]  # fmt: skip
    try:
        _wait_for(run / "config.yaml", nodes)  # written once all ranks have met
        seen = [_ranks_of(node.pid) for node in nodes]
        codes = [node.wait(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            kill(node)
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], outputs
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    assert [[tuple(rank[name] for name in names) for rank in ranks] for ranks in seen] == [
        [("0", "0", "3", "0")],
        [("1", "1", "3", "0,1"), ("2", "0", "3", "0,1")],  # DeepSpeed's local rank is the rank modulo the slots
    ]
    assert "done at step 3/3" in outputs[0] and "done at step" not in outputs[1]
    assert len(metrics(run)) == 3
    assert json.loads((run / "env.json").read_text())["ranks"] == 3


def _wait_for(path: Path, nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), f"no {path}"
        time.sleep(0.02)


def _ranks_of(session: int) -> list[dict[str, str]]:
    """The environments of a launcher's training processes, by rank."""
    found = {}
    for pid in session_processes(session):
        try:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # a command that a rank ran, and that is done
            continue
        named = dict(line.partition("=")[::2] for line in variables if "=" in line)
        if "RANK" in named and any(word.endswith("pipeline/train.py") for word in command):
            found[int(named["RANK"])] = named  # once, even if a fork of it is about to run a command
    return [named for _, named in sorted(found.items())]
