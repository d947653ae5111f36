"""The job scripts without Slurm: what they would submit, and what they refuse."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.launch import BIN, ROOT, environment, free_port

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
GOLDEN = ROOT / "tests/slurm/golden"
BAD_NODE = 3


def chain(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "slurm/chain.sh", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(), **env}, text=True, capture_output=True, timeout=240, check=False
    )


def test_shellcheck_finds_nothing() -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=path)
    assert checker, "shellcheck is part of the dev requirements"
    done = subprocess.run(
        [checker, *(str(path.relative_to(ROOT)) for path in SCRIPTS)],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_what_a_chain_would_submit(golden: Path, tmp_path: Path) -> None:
    """A golden file has a line `# RUN STATE` for each existing run, the command and its output."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    start, _, expected = golden.read_text().partition("$ ")
    for line in start.splitlines():
        _, run, state = line.split()
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "status.json").write_text(json.dumps({"state": state, "step": 3}))
    command, _, printed = expected.partition("\n")
    plain = {"PATH": os.defpath}  # without mma, names are not checked
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=plain, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", printed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frob"], "unknown option '--frob'"),
        (["--pt"], "--pt needs a value"),
        (["--shards", "0"], "--shards 0: give 1 or more"),
        (
            ["--pt", "a/stage.yaml", "--sft", "b/stage.yaml"],
            "two recipes would share the run folder runs/stage: rename one",
        ),
        (["--pt", "demo_pt,demo_pt"], "two recipes would share the run folder runs/demo_pt: rename one"),
        (["--policies", "mma,causal,mma"], "two recipes would share the run folder runs/demo_sft: rename one"),
        (["--pt", ""], "--pt '': a name is empty; use none to skip the stage"),
        (["--policies", ","], "--policies ',': a name is empty"),
        (["--policies", "none"], "--policies none: name a mask policy, or skip SFT with --sft none"),
        (["--sft", "a.yaml,"], "--sft 'a.yaml,': a name is empty"),
        (["--data", "nlvrr"], "recipe 'nlvrr' is neither a file nor a shipped name (did you mean 'nlvr'?)"),
        (["--pt", "demo_tp", "--dry-run"], "unknown recipe 'demo_tp' (did you mean 'demo_pt'?)"),
        (["--policies", "mma,casual", "--dry-run"], "unknown mask policy 'casual' (did you mean 'causal'?)"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], words: str) -> None:
    done = chain(*options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_a_run_has_the_name_of_its_recipe_in_any_folder() -> None:
    names = "demo_pt my.yaml v1.2/stage.yaml v1.2/stage.v3.yml lr1e-4.5"
    call = f". slurm/lib.sh && for name in {names}; do run_name $name; done"
    done = subprocess.run(["bash", "-c", call], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["demo_pt", "my", "stage", "stage.v3", "lr1e-4.5"]


@pytest.mark.parametrize("script", ["data_prep.sh", "pt.sh", "sft_mma.sh", "evaluate.sh", "study.sh"])
def test_a_job_script_outside_slurm_prints_how_to_submit_it(script: str) -> None:
    done = subprocess.run(
        ["bash", f"slurm/{script}"], cwd=ROOT, env=environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert f"sbatch slurm/{script}" in done.stderr


def in_a_job(folder: Path, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a job script with stand-ins for the programs, which print how they were called."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "slurm").unlink(missing_ok=True)
    (folder / "slurm").symlink_to(ROOT / "slurm")
    for program in ("mma", "mma-prep"):
        (folder / "bin" / program).write_text(f'#!/bin/sh\necho "{program} $*"\n')
        (folder / "bin" / program).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**environment(), "PATH": path, "VENV": "none", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", **env}
    return subprocess.run(
        ["bash", f"slurm/{script}", *words], cwd=folder, env=env, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    ("tasks", "shares", "outcome"),
    [
        ("0 0 3", "", "--shard 0/4"),
        ("3 0 3", "", "--shard 3/4"),
        ("3 3 17", "64", "--shard 3/64"),
        ("3 3 17", "", "set SHARES"),
        ("4 3 5", "", "set SHARES"),
    ],
)
def test_an_array_task_takes_its_own_share(tasks: str, shares: str, outcome: str, tmp_path: Path) -> None:
    number, first, last = tasks.split()
    count = {"3": "4", "17": "2", "5": "3"}[last]
    array = {"ID": number, "MIN": first, "MAX": last, "COUNT": count}
    env = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    done = in_a_job(tmp_path, "data_prep.sh", RECIPE="aki_pt", SHARES=shares, **env)
    assert outcome in done.stdout + done.stderr
    assert done.returncode == (2 if "set" in outcome else 0)


@pytest.mark.parametrize(
    ("env", "outcome"),
    [
        ({}, "mma bench pope --model runs/demo_sft/export --data data/b"),
        ({"BENCH_FLAGS": "--limit '5 6'"}, "--data data/b --limit 5 6"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SHARES": "4"}, "--data data/b --shard 1/4"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SHARES": "4", "BENCH": "none"}, "set BENCH, or leave --array out"),
        ({"BENCH_DATA": ""}, "BENCH=pope needs BENCH_DATA"),
    ],
)
def test_benchmarks_follow_the_evaluation(env: dict[str, str], outcome: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path, 3)
    done = in_a_job(tmp_path, "evaluate.sh", **{"BENCH": "pope", "BENCH_DATA": "data/b", **env})
    assert outcome in done.stdout + done.stderr
    assert done.returncode == (0 if "--data" in outcome else 2)
    assert ("mma evaluate" in done.stdout) == (done.returncode == 0 and "SHARES" not in env)
    table = run / "bench.txt"
    assert table.is_file() == (done.returncode == 0 and "SHARES" not in env)
    assert not table.is_file() or table.read_text() in done.stdout


@pytest.mark.parametrize("exported", [None, 2])
def test_an_array_task_never_exports(exported: int | None, tmp_path: Path) -> None:
    finished_run(tmp_path, exported)
    env = {"BENCH": "pope", "BENCH_DATA": "b", "SLURM_ARRAY_TASK_ID": "0", "SHARES": "2"}
    done = in_a_job(tmp_path, "evaluate.sh", **env)
    assert done.returncode == 2 and "sbatch slurm/evaluate.sh runs/demo_sft before the array" in done.stderr
    assert "mma" not in done.stdout


def test_benchmarks_of_two_runs_are_compared(tmp_path: Path) -> None:
    finished_run(tmp_path, 3)
    for name in ("demo_sft_causal", "demo_sft_prefix"):
        shutil.copytree(tmp_path / "runs/demo_sft", tmp_path / "runs" / name)
    runs = ("runs/demo_sft", "runs/demo_sft_causal", "runs/demo_sft_prefix")
    done = in_a_job(tmp_path, "evaluate.sh", *runs, EVAL_PACKS="none", BENCH="all", BENCH_DATA="b")
    for other in ("causal", "prefix"):
        command = f"mma bench all --model runs/demo_sft/export --compare runs/demo_sft_{other}/export --data b"
        assert command in done.stdout
        assert (tmp_path / f"runs/demo_sft/bench_beside_demo_sft_{other}.txt").read_text() == f"{command}\n"


def test_a_chain_shares_benchmarks_over_an_array(tmp_path: Path) -> None:
    bench = ["--bench", "pope,mme-p", "--bench-data", str(tmp_path)]
    names = ["--data", "none", "--pt", "none", "--eval", "none", "--dry-run"]
    one = chain(*names, *bench).stdout.splitlines()
    assert f"EVAL_PACKS=none BENCH=pope,mme-p BENCH_DATA={tmp_path}" in one[-1]
    *_, export, array, table = chain(*names, *bench, "--bench-shards", "4").stdout.splitlines()
    assert "BENCH" not in export
    assert "--dependency=afterok:<2>" in array and "SHARES=4" in array and "--array=0-3" in array
    assert "--dependency=afterok:<3>" in table and "SHARES" not in table and "BENCH=pope,mme-p" in table
    for options, words in (
        (["--bench", "pope"], "--bench pope needs --bench-data"),
        (["--bench", "popo", "--bench-data", str(tmp_path)], "unknown benchmark 'popo' (did you mean 'pope'?)"),
        ([*bench, "--bench-shards", "0"], "--bench-shards 0: give 1 or more"),
    ):
        refused = chain(*names, *options)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and words in refused.stderr


def finished_run(folder: Path, exported: int | None) -> Path:
    """A finished run of 3 steps, and its export."""
    run = folder / "runs/demo_sft"
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "done", "step": 3}))
    if exported is not None:
        (run / "export").mkdir()
        (run / "export/config.json").write_text(json.dumps({"mma": {"step": exported}}, indent=1))
    return run


@pytest.mark.parametrize(("exported", "again"), [(None, True), (3, False), (2, True)])
def test_an_export_holds_the_last_step_of_its_run(exported: int | None, again: bool, tmp_path: Path) -> None:
    run = finished_run(tmp_path, exported)
    if exported == 3:
        in_a_job(tmp_path, "evaluate.sh")  # records the packs and steps of the scores
    if exported is not None:
        (run / "evaluation.json").write_text("{}")
    done = in_a_job(tmp_path, "evaluate.sh")
    assert done.returncode == 0, done.stderr
    assert ("mma export runs/demo_sft runs/demo_sft/export" in done.stdout) == again
    assert ("mma evaluate --json runs/demo_sft/evaluation.json" in done.stdout) == again


def test_scores_are_kept_only_for_the_same_packs_and_flags(tmp_path: Path) -> None:
    run = finished_run(tmp_path, 3)
    (tmp_path / "eval").mkdir()
    for packs, content, flags, again in (
        ("eval", "a", "", True),
        ("eval", "a", "", False),
        ("eval", "a", "--limit 5", True),
        ("other", "a", "--limit 5", True),
        ("eval", "a", "--limit 5", True),
        ("eval", "changed", "--limit 5", True),
        ("eval", "changed", "--limit 5", False),
    ):
        (tmp_path / "eval/manifest.json").write_text(content)
        done = in_a_job(tmp_path, "evaluate.sh", EVAL_PACKS=packs, EVAL_FLAGS=flags)
        assert done.returncode == 0 and ("mma evaluate --json" in done.stdout) == again, (packs, content, flags)
        (run / "evaluation.json").write_text("{}")


def test_a_step_that_is_refused_once_does_not_make_its_node_lost(tmp_path: Path) -> None:
    """As while Slurm cleans up the previous step; a node that refuses every step is lost."""
    refusing = f"""#!/bin/sh
case "$*" in *--nodelist=gone*) exit 1 ;; esac
[ -f {tmp_path}/refused ] || {{ touch {tmp_path}/refused; exit 1; }}
"""
    for program, script in {"srun": refusing, "scontrol": "#!/bin/sh\necho back gone\n"}.items():
        (tmp_path / program).write_text(script)
        (tmp_path / program).chmod(0o755)
    env = {**environment(), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NODE_PATIENCE": "3"}
    call = ["bash", "-c", ". slurm/lib.sh && SLURM_JOB_NODELIST=all silent_nodes"]
    done = subprocess.run(call, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "gone ") and (tmp_path / "refused").exists()


def test_runs_of_the_same_name_are_compared_in_files_of_their_own(tmp_path: Path) -> None:
    for run in ("runs/demo_sft", "a b/*/x", "other/x"):
        (tmp_path / run / "export").mkdir(parents=True)
        (tmp_path / run / "status.json").write_text(json.dumps({"state": "done", "step": 3}))
        (tmp_path / run / "export/config.json").write_text(json.dumps({"mma": {"step": 3}}, indent=1))
    done = in_a_job(tmp_path, "evaluate.sh", "runs/demo_sft", "a b/*/x", "other/x", EVAL_FLAGS="--limit '5 6'")
    assert done.returncode == 0, done.stderr
    files = ["a b=*=x", "other=x"]
    assert [f"runs/demo_sft/evaluation_beside_{name}.json" in done.stdout for name in files] == [True, True]
    single = in_a_job(tmp_path, "evaluate.sh", "runs/demo_sft", "other/x", EVAL_PACKS="other")
    assert "runs/demo_sft/evaluation_beside_x.json" in single.stdout


def test_paths_with_spaces_and_globs_stay_one_word(tmp_path: Path) -> None:
    """In options, in recipes and in flags quoted as in a shell; nothing is expanded."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).touch()
    words = ["--data", "my data/*.yaml", "--pt", "none", "--sft", "my runs/a b.yaml,*.yaml", "--eval", "held out"]
    env = {"PATH": os.defpath, "TRAIN_SBATCH": "--comment='two words' --nodes=2"}
    done = subprocess.run(
        ["bash", "slurm/chain.sh", *words, "--dry-run"],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [word for words in jobs for word in words if word.startswith("RECIPE=")] == [
        "RECIPE=my data/*.yaml", "RECIPE=my runs/a b.yaml", "RECIPE=*.yaml",
    ]  # fmt: skip
    assert "--comment=two words" in jobs[1] and "EVAL_PACKS=held out" in jobs[3]
    assert jobs[3][-1] == "runs/*" and "RUN_DIR=runs/a b" in jobs[1]
    call = ['. slurm/lib.sh && split FLAGS && printf "[%s]" "${words[@]}"']
    for text, shown in (("--a 'b c' *.yaml $HOME", "[--a][b c][*.yaml][$HOME]"), ("", "[]")):
        done = subprocess.run(
            ["bash", "-c", *call], cwd=tmp_path, env={**env, "FLAGS": text}, text=True, capture_output=True, check=False
        )
        assert done.stdout == shown, done.stderr
    done = subprocess.run(
        ["bash", "-c", *call], cwd=tmp_path, env={**env, "FLAGS": "'open"}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 2 and "a quote is not closed" in done.stderr


def test_the_scripts_are_copied_and_site_settings_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "init", str(tmp_path)]) == 0
    copied = {path.name for path in (tmp_path / "slurm").iterdir()}
    assert copied == {path.name for path in (ROOT / "slurm").iterdir() if path.is_file()} | {"logs"}
    assert os.access(tmp_path / "slurm/chain.sh", os.X_OK)
    (tmp_path / "slurm/env.sh").write_text("export SBATCH_ACCOUNT=mine\n")
    assert main(["slurm", "init", str(tmp_path)]) == 0
    (tmp_path / "slurm/pt.sh").write_text("# changed\n")
    assert main(["slurm", "init", str(tmp_path)]) == 2
    assert "pt.sh differ from the shipped scripts: --force replaces them" in capsys.readouterr().err
    assert main(["slurm", "init", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "slurm/env.sh").read_text() == "export SBATCH_ACCOUNT=mine\n"
    assert (tmp_path / "slurm/pt.sh").read_bytes() == (ROOT / "slurm/pt.sh").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["both pass", "one bad"])
def test_the_node_check_names_the_bad_node(broken: bool, tmp_path: Path) -> None:
    port = str(free_port())
    folders = [tmp_path, tmp_path / "unmounted" if broken else tmp_path]
    nodes = []
    for rank, folder in enumerate(folders):
        place = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURMD_NODENAME": f"node-{rank}"}
        env = environment({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        command = [sys.executable, str(ROOT / "slurm/check_nodes.py"), str(folder), "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        nodes.append(subprocess.Popen(command, env=env, text=True, **pipes))
    (output, _), (silence, words) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [BAD_NODE if broken else 0] * 2, words
    assert not silence and "Traceback" not in words
    if broken:
        assert output.startswith("bad node node-1: ") and "unmounted cannot be written" in output
    else:
        assert output.splitlines() == ["GPUs and disks: 2 nodes passed", "network: 2 nodes passed"]
