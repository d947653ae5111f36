"""Every problem that `mma doctor` can find, really caused; and what `mma status` prints about runs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data_prep.common.events import EventLedger
from pipeline.cli import main
from pipeline.commands import doctor_checks
from pipeline.commands.doctor_checks import Finding
from tests.launch import ROOT, Finished, run
from tests.pipeline.serving.helpers import make_export
from tests.pipeline.training.runs import STEPS, flags, train


def said(findings: Iterable[Finding], kind: str = "wrong") -> str:
    return "\n".join(finding.text for finding in findings if finding.kind == kind)


@pytest.fixture(scope="module")
def finished(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("doctor") / "run"
    train(small_demo, run_dir, ranks=1).check()
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, for a test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def set_state(run_dir: Path, **change: object) -> None:
    path = run_dir / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.slow
def test_a_healthy_machine_has_no_problems(
    run_dir: Path, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The shipped recipe's own run folder may hold a run of this checkout, on other packs.
    (tmp_path / "demo_sft.yaml").write_text(f"extends: demo_sft\nrun_dir: {tmp_path / 'new'}\n")
    recipe = [
        "--recipe",
        str(tmp_path / "demo_sft.yaml"),
        "--ranks",
        "2",
        "--data.packs",
        str(small_demo / "packs/sft"),
    ]
    words = ["doctor", "--data", str(small_demo), "--checkpoint", str(run_dir), "--run-dir", str(run_dir), *recipe]
    code = main(words)
    output = capsys.readouterr().out
    assert code == 0, output
    for part in ("deepspeed ", "GiB free", "processes of this machine all-reduce over", "packs/sft: ",
                 f"done at step {STEPS} of {STEPS}", "step-00000006: complete", "the next start resumes from",
                 "no problems found"):  # fmt: skip
        assert part in output, output


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_with_the_one_a_start_resumes_from(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = run_dir / "checkpoints/step-00000006/rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    (run_dir / "checkpoints/.step-00000008.abc.tmp").mkdir()
    monkeypatch.setattr("pipeline.commands.doctor.check_local_network", lambda: iter(()))
    assert main(["doctor", "--checkpoint", str(run_dir), "--run-dir", str(run_dir)]) == 1
    output = capsys.readouterr().out
    assert f"WRONG  {shard} is damaged: restore the folder from a copy" in output
    assert "the next start resumes from" in output and "step-00000004" in output
    assert ".step-00000008.abc.tmp is incomplete; starts ignore it" in output
    assert output.endswith("1 problem to fix\n")


@pytest.mark.slow
def test_how_a_run_ended_is_printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_state(run_dir, state="running")
    assert "killed at step 6 of 6: its process ended without a report" in said(doctor_checks.check_checkpoint(run_dir))
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert said(doctor_checks.check_checkpoint(run_dir)) == ""
        assert main(["status", str(run_dir)]) == 0
        assert "running   step 6/6  loss " in capsys.readouterr().out
    set_state(run_dir, state="failed", error="rank 3 died")
    assert "failed at step 6 of 6: rank 3 died; see " in said(doctor_checks.check_checkpoint(run_dir))
    assert main(["status", str(run_dir)]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{run_dir}  failed    step 6/6  loss ") and line.endswith(
        "ago  1 file-unverified  rank 3 died\n"
    )
    assert "step-00000006" in line and line.count("\n") == 1


@pytest.mark.slow
def test_torn_and_missing_checkpoints(run_dir: Path) -> None:
    (run_dir / "checkpoints/step-00000006/manifest.json").write_text("{")
    (run_dir / "checkpoints/step-00000004/tokenizer/tokenizer.model").unlink()
    text = said(doctor_checks.check_checkpoint(run_dir))
    assert "step-00000006 is not a" in text and "tokenizer.model is missing" in text
    shutil.rmtree(run_dir / "checkpoints")
    assert "has no complete checkpoint" in said(doctor_checks.check_checkpoint(run_dir))
    assert "is not a run folder" in said(doctor_checks.check_checkpoint(run_dir / "nowhere"))


@pytest.mark.slow
def test_values_that_are_not_finite_are_a_problem(run_dir: Path) -> None:
    """Intact hashes say nothing about a run that has diverged: the newest checkpoint is one that a start refuses."""
    folder = run_dir / "checkpoints/step-00000006"
    shard = folder / "rank-00000.safetensors"
    tensors = load_file(shard)
    key = next(name for name in sorted(tensors) if name.startswith("master|"))
    tensors[key][0] = float("nan")
    save_file(tensors, shard)
    findings = list(doctor_checks.check_checkpoint(run_dir))
    assert f"{shard} is damaged" in said(findings), "its hash is checked first"
    unhashed = pytest.MonkeyPatch()
    with unhashed.context() as patch:
        patch.setattr("pipeline.checkpoints.checkpoint.Checkpoint.faults", lambda self: [])
        findings = list(doctor_checks.check_checkpoint(run_dir))
    assert f"{folder}: 1 tensors are not finite, such as {key} in rank-00000.safetensors" in said(findings)
    assert "the next start resumes from" not in said(findings, "note")


def test_an_exported_model_is_checked_whole(tmp_path: Path) -> None:
    folder = make_export(tmp_path)
    assert said(doctor_checks.check_model(folder)) == ""
    assert "all values are finite" in said(doctor_checks.check_model(folder), "fine")
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert weights.name in said(doctor_checks.check_model(folder))
    assert "gone" in said(doctor_checks.check_model(tmp_path / "gone"))


def test_damaged_run_folders_are_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Binary, torn, deep, endless and odd files: the other runs are still shown."""
    good = b'{"state": "done", "step": 3, "steps": 9}'
    runs: dict[str, tuple[bytes, bytes]] = {
        "binary": (bytes(range(256)), b""),
        "deep": (b"[" * 100_000, b""),
        "good": (good, b'{"step": 3, "loss": 0.5}\n'),
        "nan": (good, b'{"step": 3, "loss": NaN}\n'),
        "odd": (b'{"state": ["x"], "step": "many", "steps": {"a": 1}, "error": "two\\nlines"}', b'{"loss": "low"}\n'),
        "torn": (b'{"state": "do', b""),
    }
    for name, (status, metrics) in runs.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").write_bytes(status)
        (tmp_path / "runs" / name / "metrics.jsonl").write_bytes(metrics)
    (tmp_path / "runs/nan/events.jsonl").symlink_to("/dev/zero")
    ledger = EventLedger(tmp_path / "runs/good/events.jsonl")
    ledger.record("step-skipped", 2)
    ledger.record("run-failed")
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"runs/{name}" for name in sorted(runs)]
    assert [line.split()[0] for line in lines if "unreadable" in line] == ["runs/binary", "runs/deep", "runs/torn"]
    assert "step 3/9  loss 0.5000" in lines[2] and lines[2].endswith("2 step-skipped, 1 run-failed")
    assert "step 3/9" in lines[3] and "two lines" in lines[4]


def test_damaged_packs(small_demo: Path, tmp_path: Path) -> None:
    packs = Path(shutil.copytree(small_demo / "packs/eval", tmp_path / "packs/eval"))
    shutil.copytree(small_demo / "images", tmp_path / "images") if (small_demo / "images").is_dir() else None
    (next(packs.glob("rows-*.arrow"))).write_bytes(b"rows")
    assert "differs from manifest.json" in said(doctor_checks.check_data(packs))
    assert "no manifest.json" in said(doctor_checks.check_data(tmp_path / "nowhere"))


def test_a_disk_without_room_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert "free some space" in said(doctor_checks.check_disk(tmp_path, need_bytes=1e18))
    assert said(doctor_checks.check_disk(tmp_path / "not/made/yet"), "fine").startswith(str(tmp_path))
    assert "cannot be written" in said(doctor_checks.check_disk(Path("/proc/self")))


def test_recipes(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_DIR", raising=False)
    assert "LLM_DIR" in said(doctor_checks.check_recipe("aki_4b_sft", [], 8))
    packs = ["--data.packs", str(small_demo / "packs/sft")]
    assert "does not divide among 3 data-parallel ranks" in said(doctor_checks.check_recipe("demo_sft", packs, 3))
    assert "nowhere" in said(doctor_checks.check_recipe("demo_sft", ["--data.packs", "nowhere"], 1))


def test_untested_and_missing_software_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(doctor_checks.check_software()) == ""
    monkeypatch.setattr("deepspeed.__version__", "0.1")
    monkeypatch.setattr("pipeline.training.run.environment.PACKAGES", ("torch", "no-such-package"))
    text = said(doctor_checks.check_software())
    assert "DeepSpeed 0.1 was not tested here" in text and "no-such-package is not installed" in text


@pytest.mark.slow
def test_a_network_that_does_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    text = said(doctor_checks.check_local_network())
    assert "no all-reduce of 2 processes over gloo at 127.0.0.1:" in text and "GLOO_SOCKET_IFNAME" in text


def test_wrong_flags_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dta", "x"]) == 2
    assert (
        "unrecognized arguments: --dta x (trainer flags need --recipe) (did you mean '--data'?)"
        in capsys.readouterr().err
    )
    assert main(["status", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_under_a_launcher_every_rank_is_checked(small_demo: Path, tmp_path: Path) -> None:
    """The recipe is planned for the ranks of the launch, with the trainer's flags."""
    script = ROOT / "tests/pipeline/commands/doctor_ranks.py"
    recipe = ["--recipe", "demo_sft", "--parallel.pp", "2", "--data.packs", str(small_demo / "packs/sft")]
    done = run(2, script, str(tmp_path), *recipe, env={"PYTHONPATH": str(ROOT)}, launcher="srun")
    assert done.code != 0
    assert "rank 1 on " in done.output and "cannot be written" in done.output, done.output
    assert "recipe demo_sft on 2 ranks" in done.output and "2 stages x 1" in done.output, done.output
    assert "1 problem to fix" in done.output


@pytest.mark.slow
def test_no_secret_gets_out(small_demo: Path, tmp_path: Path) -> None:
    """Secrets are in the environment, and inside words of the command line that are allowed there."""
    hidden = {"HF_TOKEN": "hf_" + "Q" * 30, "WANDB_API_KEY": "w" * 40, "AWS_SECRET": "aws+secret/value-1",
              "NCCL_TOKEN": "nccl-secret-value"}  # fmt: skip
    words = flags(small_demo, tmp_path / "run", "--train.steps", "1")

    def outcome(*more: str) -> Finished:
        return run(1, ROOT / "pipeline/train.py", *words, *more, env=hidden, launcher="srun")

    refused = outcome("--model.llm.config.note", hidden["AWS_SECRET"])
    assert refused.code == 2 and "model.llm.config.note contains a secret" in refused.output
    foreign = outcome(f"--hf-token={hidden['HF_TOKEN']}")
    assert foreign.code == 2 and "unknown flag '--hf-token'" in foreign.output
    odd = outcome("--init-from", f"s3://user:{hidden['WANDB_API_KEY']}@bucket/run")
    assert odd.code == 2
    texts = [refused.output, foreign.output, odd.output, outcome().check().output]
    texts += [path.read_bytes().decode(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(texts) > 8
    assert not [value for value in hidden.values() for text in texts if value in text]
    facts = json.loads((tmp_path / "run/env.json").read_text())
    assert facts["variables"]["OMP_NUM_THREADS"] == "1" and "NCCL_TOKEN" not in facts["variables"]
    assert os.environ.get("HF_TOKEN") is None or "HF_TOKEN" not in json.dumps(facts)
