"""Whole runs: ranks, stages, accumulation, stops and resumes, and the command of the README on the real launcher."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from data_prep.common.events import EVENTS_FILE, EventLedger
from pipeline.checkpoints.manifest import hashed_json
from pipeline.cli import main as mma
from pipeline.train import main
from tests.launch import ROOT, kill, start
from tests.pipeline.training.runs import (
    STEPS,
    curve,
    files_limited_to,
    flags,
    furthest,
    metrics,
    same_bits,
    train,
    wait_for_step,
    weights,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    output = train(small_demo, run_dir).check().output
    assert f"done at step {STEPS}/{STEPS}" in output
    return run_dir


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    assert json.loads((undisturbed / "status.json").read_text())["state"] == "done"
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, STEPS + 1))
    assert metrics(undisturbed)[-1]["consumed_packs"] == 12 * STEPS
    assert {"config.yaml", "env.json", "status.json", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in undisturbed.iterdir()
    }
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]


def test_a_second_start_says_that_all_is_done(small_demo: Path, undisturbed: Path) -> None:
    before = curve(undisturbed)
    assert f"done at step {STEPS}/{STEPS}" in train(small_demo, undisturbed).check().output
    assert curve(undisturbed) == before


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        pytest.param(1, [], id="1 rank, accumulating every pack"),
        pytest.param(1, ["--parallel.micro-batches", "2"], id="1 rank, 2 micro-batches"),
        pytest.param(3, [], id="3 ranks"),
        pytest.param(2, ["--parallel.pp", "2"], id="2 stages"),
        pytest.param(
            2, ["--parallel.gathered-fraction", "0", "--parallel.reduce-once", "false"], id="true ZeRO-3 memory"
        ),
        pytest.param(2, ["--train.gradient-checkpointing", "true"], id="recomputed layers"),
    ],
)
def test_the_result_does_not_depend_on_how_ranks_share_it(
    ranks: int, more: list[str], small_demo: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(small_demo, tmp_path / "run", *more, ranks=ranks).check()
    for ours, reference in zip(curve(tmp_path / "run"), curve(undisturbed), strict=True):
        assert ours["targets"] == reference["targets"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert furthest(weights(tmp_path / "run"), weights(undisturbed)) <= 1e-5


def test_a_stop_file_ends_the_run_saved_and_the_same_command_resumes(
    small_demo: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    train(small_demo, run_dir, "--checkpoint.asynchronous", "false").check()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"
    assert len(metrics(run_dir)) == 1, "asked to stop before it began: one step, saved"
    assert not (run_dir / "STOP").exists()
    train(small_demo, run_dir, "--checkpoint.asynchronous", "false").check()
    assert curve(run_dir) == curve(undisturbed)
    for ours in run_dir.glob("checkpoints/*/rank-*"):
        theirs = undisturbed / ours.relative_to(run_dir)
        assert ours.read_bytes() == theirs.read_bytes(), "written in the pause, or beside the steps: the same bytes"
    assert same_bits(weights(run_dir), weights(undisturbed))


def test_changes_on_resume_are_refused_or_recorded(
    small_demo: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    changes = ["--mask.policy", "causal", "--log.every-steps", "2"]
    assert main(flags(small_demo, run_dir, *changes)) == 2
    said = capsys.readouterr().err
    assert "(mask.policy: 'mma' -> 'causal'): restore them" in said and "--allow-change mask.policy" in said
    output = train(small_demo, run_dir, *changes, "--allow-change", "mask", ranks=1).check().output
    assert "changed since: mask.policy: 'mma' -> 'causal' (changes the result)" in output
    assert "changed since: log.every_steps: 1 -> 2\n" in output and output.count("changed since") == 2
    counts = EventLedger(run_dir / EVENTS_FILE).summary()
    assert counts["setting-changed"] == 1 == counts["setting-adjusted"]


def test_strict_makes_an_event_fatal(small_demo: Path, tmp_path: Path) -> None:
    ended = train(small_demo, tmp_path / "run", "--strict", "version-untested,file-unverified", ranks=2)
    assert ended.code == 2 and "Traceback" not in ended.output
    assert "error: file-unverified: 1 x a file was read without checking its hash (path " in ended.output
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(
    small_demo: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shard = run_dir / "checkpoints/step-00000006/rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(bytes(data))
    output = train(small_demo, run_dir).check().output
    assert "skipping a damaged checkpoint" in output
    assert "resuming from" in output and "step-00000004" in output
    assert curve(run_dir) == curve(undisturbed)
    assert same_bits(weights(run_dir), weights(undisturbed))


def test_a_stage_starts_from_the_weights_of_another_run(small_demo: Path, undisturbed: Path, tmp_path: Path) -> None:
    more = ["--init-from", str(undisturbed), "--train.steps", "1", "--train.lr", "1e-30", "--train.min-lr", "0"]
    more += ["--mask.policy", "causal"]
    output = train(small_demo, tmp_path / "run", *more, recipe="demo_pt", packs="pt").check().output
    assert f"starting from the weights of {undisturbed}" in output
    assert EventLedger(tmp_path / "run" / EVENTS_FILE).summary()["mask-changed"] == 1
    assert same_bits(weights(tmp_path / "run"), weights(undisturbed))


def test_a_checkpoint_is_all_an_export_needs(undisturbed: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(undisturbed / "checkpoints/step-00000006", moved)
    modes = {path.stat().st_mode & 0o777 for path in moved.rglob("*") if path.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}, "readable as any other file"
    assert str(ROOT) not in (moved / "manifest.json").read_text()
    assert mma(["export", str(moved), str(tmp_path / "model")]) == 0
    (moved / "tokenizer/tokenizer.model").write_bytes(b"damaged")
    assert mma(["export", str(moved), str(tmp_path / "again")]) == 2
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("asynchronous", "steps"), [("false", range(2, 3)), ("true", range(2, STEPS + 1))])
def test_a_checkpoint_that_cannot_be_written_fails_the_run_in_words(
    asynchronous: str, steps: range, small_demo: Path, tmp_path: Path
) -> None:
    with files_limited_to(200_000):
        job = train(small_demo, tmp_path / "run", "--checkpoint.asynchronous", asynchronous)
    assert job.code == 2 and "Traceback" not in job.output
    assert "step-00000002 cannot be written" in job.output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and status["step"] in steps, status
    assert not list((tmp_path / "run/checkpoints").iterdir()), "nothing is left of it"


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(
    small_demo: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "rank-00000.safetensors").unlink()
    before = curve(run_dir)
    job = train(small_demo, run_dir)
    assert job.code == 2 and "Traceback" not in job.output
    assert "no checkpoint is intact" in job.output
    assert curve(run_dir) == before


def test_a_run_folder_that_cannot_be_made_is_one_line(small_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    job = train(small_demo, tmp_path / "run")
    assert job.code == 2 and "Traceback" not in job.output
    assert job.output.count("cannot be written") == 1


def test_what_one_rank_finds_wrong_ends_all_in_one_line(small_demo: Path, tmp_path: Path) -> None:
    """Every rank looks through its share of the packs; rank 1's is the second largest file."""
    copy = tmp_path / "demo"
    shutil.copytree(small_demo, copy, ignore=shutil.ignore_patterns("raw"))
    read = [*copy.glob("packs/sft/*"), *copy.glob("images/*/*")]
    damaged = sorted((path for path in read if path.is_file()), key=lambda path: path.stat().st_size)[-2]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    job = train(copy, tmp_path / "run", "--data.verify", "true")
    assert job.code == 2 and "Traceback" not in job.output
    (line,) = re.findall("^error: .*", job.output, re.MULTILINE)
    assert line.startswith("error: rank 1 on ") and f"{damaged.name}: differs from" in line
    assert not (tmp_path / "run/status.json").exists(), "it was not begun"


def test_shards_cover_every_parameter_once(undisturbed: Path) -> None:
    folder = undisturbed / "checkpoints/step-00000006"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["params"].items():
        sizes = []
        for rank in range(2):
            with safe_open(folder / f"rank-{rank:05d}.safetensors", framework="pt") as shards:
                sizes.append(shards.get_slice(f"{'master' if entry['trained'] else 'frozen'}|{name}").get_shape()[0])
        numel = 1
        for size in entry["shape"]:
            numel *= size
        assert numel <= sum(sizes) < numel + 2, name


def test_the_plain_command_line_trains_the_demo(small_demo: Path, tmp_path: Path) -> None:
    """The line of the README word for word, in a folder where the demo data is there already."""
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(small_demo)
    job = start(1, "pipeline/train.py", "--deepspeed", "ds_configs/zero3.json", cwd=tmp_path)
    try:
        wait_for_step(tmp_path / "runs/demo_sft", 2, timeout_s=120)
        (tmp_path / "runs/demo_sft/STOP").touch()
        output, _ = job.communicate(timeout=60)
    finally:
        kill(job)
    assert job.returncode == 0, output
    assert "stopped at step" in output
    assert json.loads((tmp_path / "runs/demo_sft/status.json").read_text())["state"] == "stopped"


def test_bf16_follows_fp32(small_demo: Path, undisturbed: Path, tmp_path: Path) -> None:
    train(small_demo, tmp_path / "run", "--train.dtype", "bf16").check()
    for ours, reference in zip(curve(tmp_path / "run"), curve(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0.02)


def test_optimizer_states_offloaded_to_the_cpu_change_nothing(
    small_demo: Path, undisturbed: Path, tmp_path: Path
) -> None:
    offload = ["--deepspeed", str(ROOT / "ds_configs/zero3_offload.json")]
    train(small_demo, tmp_path / "run", *offload).check()
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in metrics(undisturbed)], rel=1e-6
    )
    assert furthest(weights(tmp_path / "run"), weights(undisturbed)) <= 1e-5


def test_other_packs_and_other_tokenizers_are_refused(
    small_demo: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(small_demo, undisturbed, packs="pt")) == 2
    assert "add --allow-change data.packs" in capsys.readouterr().err
    assert main(flags(small_demo, undisturbed, "--train.global-batch-size", "6")) == 2
    assert "(train.global_batch_size: 12 -> 6): restore them" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(undisturbed / "checkpoints/step-00000006", other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["xxh3"]
    manifest["model"]["tokenizer_sha256"] = "0" * 64
    (other / "manifest.json").write_text(hashed_json(manifest))
    assert main(flags(small_demo, tmp_path / "new", "--init-from", str(other))) == 2
    assert "a different tokenizer" in capsys.readouterr().err


def test_an_export_starts_a_run(small_demo: Path, undisturbed: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert mma(["export", str(undisturbed), str(export)]) == 0
    more = ["--init-from", str(export), "--train.steps", "1", "--train.lr", "1e-30", "--train.min-lr", "0"]
    strict = ["--mask.policy", "causal", "--strict", "mask-changed"]
    assert train(small_demo, tmp_path / "strict", *more, *strict, ranks=1).code == 2
    train(small_demo, tmp_path / "run", *more, ranks=2).check()
    assert "mask-changed" not in EventLedger(tmp_path / "run" / EVENTS_FILE).summary()
    assert same_bits(weights(tmp_path / "run"), weights(undisturbed))
