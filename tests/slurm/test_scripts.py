"""The job scripts as text: what they would submit, and how they are refused. Nothing here needs Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import BIN, ROOT, environment, free_port

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
AFTER = "--kill-on-invalid-dep=yes"


def chain(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "slurm/chain.sh", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(), **env}, text=True, capture_output=True, timeout=30, check=False
    )


def test_shellcheck_has_nothing_to_say() -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=path)
    assert checker, "shellcheck is part of the dev requirements"
    done = subprocess.run(
        [checker, *(str(path.relative_to(ROOT)) for path in SCRIPTS)],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_demo_chain() -> None:
    assert chain("--dry-run").stdout.splitlines() == [
        "<1> RECIPE=demo sbatch --parsable slurm/data_prep.sh",
        "<2> RECIPE=demo_pt RUN_DIR=runs/demo_pt INIT_FROM= "
        f"sbatch --parsable --dependency=afterok:<1> {AFTER} slurm/pt.sh",
        "<3> RECIPE=demo_sft POLICY=mma PT_RUN_DIR=runs/demo_pt RUN_DIR=runs/demo_sft "
        f"sbatch --parsable --dependency=afterok:<2> {AFTER} slurm/sft_mma.sh",
        "<4> EVAL_PACKS=data/demo/packs/eval "
        f"sbatch --parsable --dependency=afterok:<3> {AFTER} slurm/evaluate.sh runs/demo_sft",
    ]


def test_several_policies_and_four_chained_stages() -> None:
    options = ["--data", "a,b", "--shards", "3", "--pt", "p1.yaml,p2", "--sft", "s1,x/s2.yaml"]
    lines = chain("--dry-run", *options, "--policies", "mma,causal", TRAIN_SBATCH="--nodes=2").stdout.splitlines()
    assert lines[:2] == [
        "<1> RECIPE=a sbatch --parsable --array=0-2 slurm/data_prep.sh",
        f"<2> RECIPE=a sbatch --parsable --dependency=afterok:<1> {AFTER} slurm/data_prep.sh",
    ]
    assert lines[4:] == [
        "<5> RECIPE=p1.yaml RUN_DIR=runs/p1 INIT_FROM= "
        f"sbatch --parsable --dependency=afterok:<2>:<4> {AFTER} --nodes=2 slurm/pt.sh",
        "<6> RECIPE=p2 RUN_DIR=runs/p2 INIT_FROM=runs/p1 "
        f"sbatch --parsable --dependency=afterok:<5> {AFTER} --nodes=2 slurm/pt.sh",
        "<7> RECIPE=s1 POLICY=mma PT_RUN_DIR=runs/p2 RUN_DIR=runs/s1 "
        f"sbatch --parsable --dependency=afterok:<6> {AFTER} --nodes=2 slurm/sft_mma.sh",
        "<8> RECIPE=x/s2.yaml POLICY=mma PT_RUN_DIR=runs/s1 RUN_DIR=runs/s2 "
        f"sbatch --parsable --dependency=afterok:<7> {AFTER} --nodes=2 slurm/sft_mma.sh",
        "<9> RECIPE=s1 POLICY=causal PT_RUN_DIR=runs/p2 RUN_DIR=runs/s1_causal "
        f"sbatch --parsable --dependency=afterok:<6> {AFTER} --nodes=2 slurm/sft_mma.sh",
        "<10> RECIPE=x/s2.yaml POLICY=causal PT_RUN_DIR=runs/s1_causal RUN_DIR=runs/s2_causal "
        f"sbatch --parsable --dependency=afterok:<9> {AFTER} --nodes=2 slurm/sft_mma.sh",
        "<11> EVAL_PACKS=data/demo/packs/eval "
        f"sbatch --parsable --dependency=afterok:<8>:<10> {AFTER} slurm/evaluate.sh runs/s2 runs/s2_causal",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frob"], "unknown option '--frob'"),
        (["--pt"], "--pt needs a value"),
        (["--shards", "0"], "--shards 0: give 1 or more"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], words: str) -> None:
    done = chain(*options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


@pytest.mark.parametrize("script", ["data_prep.sh", "pt.sh", "sft_mma.sh", "evaluate.sh"])
def test_a_job_script_outside_of_slurm_says_how_to_call_it(script: str) -> None:
    done = subprocess.run(
        ["bash", f"slurm/{script}"], cwd=ROOT, env=environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert f"sbatch slurm/{script}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["both fit", "one bad"])
def test_the_node_check_names_the_bad_node(broken: bool, tmp_path: Path) -> None:
    port = str(free_port())
    folders = [tmp_path, tmp_path / "unmounted" if broken else tmp_path]
    nodes = []
    for rank, folder in enumerate(folders):
        place = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURMD_NODENAME": f"node-{rank}"}
        env = environment({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        command = [sys.executable, str(ROOT / "slurm/check_nodes.py"), str(folder), "0"]
        nodes.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE))
    output = nodes[0].communicate(timeout=120)[0]
    nodes[1].communicate(timeout=120)
    assert nodes[0].returncode == int(broken)
    if broken:
        assert output.startswith("bad node node-1: ") and "unmounted cannot be written" in output
    else:
        assert output.splitlines() == ["GPUs and disks: 2 nodes are fit", "network: 2 nodes are fit"]
