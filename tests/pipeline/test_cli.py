"""The ``mma`` command on a tiny export."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.launch import ROOT
from tests.pipeline.serving.helpers import make_export, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("model"))


def test_help_is_instant_and_names_every_command() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 5  # a loaded machine; heavy imports are checked by name
    assert not [name for name in ("torch", "transformers", "deepspeed") if f"| {name}\n" in done.stderr]
    assert all(name in done.stdout for name in ("mask", "prove", "export", "generate", "evaluate"))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_generate_prints_one_answer(
    images: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for number in range(images):
        (tmp_path / f"{number}.png").write_bytes(picture(number).read())
        files.append(str(tmp_path / f"{number}.png"))
    words = ["generate", *files, "what colour is the circle", "--model", str(model), "--max-new-tokens", "3"]
    assert main([*words, "--device", "cpu", "--beams", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["generate", "gone.png", "left", "--model", "MODEL"], "is not a file", id="image"),
        pytest.param(["generate", "left", "--model", "gone"], "gone is not an exported model", id="model"),
        pytest.param(
            ["generate", "left", "--model", "MODEL", "--device", "cuda"], "torch sees 0 GPUs here", id="device"
        ),
        pytest.param(["evaluate", "--model", "MODEL", "--packs", "gone"], "gone is not a pack folder", id="packs"),
        pytest.param(
            ["evaluate", "--model", "MODEL", "--compare", "MODEL", "--packs", "gone"], "name another export", id="same"
        ),
        pytest.param(
            ["schedule", "--virtual-stages", "2"],
            "mma: schedule: parallel: virtual_stages=2 needs schedule=interleaved",
            id="schedule",
        ),
        pytest.param(["export", "gone", "out"], "gone has no checkpoint", id="run"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    words: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(model) if word == "MODEL" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mma: ") and len(error.splitlines()) == 1
    assert main([*(str(model) if word == "MODEL" else word for word in words), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "V4 Q2 A2", "--out", "/proc/none/mask.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mma: ") and "/proc/none" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_every_command_survives_every_kind_of_output(tmp_path: Path) -> None:
    """A closed stdout, an ASCII terminal and a reader that has gone are no errors; a full disk is one line."""
    (tmp_path / "status.json").write_text('{"state": "done", "step": 3, "error": "café"}')
    commands = [
        ["--version"], ["demo", "--help"], ["status", str(tmp_path)], ["doctor", "--run-dir", str(tmp_path)],
        ["estimate", "demo_sft"], ["schedule"], ["completion", "bash"], ["train", "--print-config"],
    ]  # fmt: skip
    cases = [(words, output) for words in commands for output in ("closed", "ascii", "gone", "full")]
    worker = [sys.executable, "-m", "tests.pipeline.output_worker"]
    done = subprocess.run(
        worker, cwd=ROOT, input=json.dumps(cases), capture_output=True, text=True, timeout=600, check=True
    )
    for (words, output), (code, error) in zip(cases, json.loads(done.stdout), strict=True):
        if output == "full":
            assert code == 2 and error.count("\n") == 1 and "No space left on device" in error, (words, code, error)
        else:
            assert (code, error) == (0, ""), (words, output, code, error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generat"], "unknown command 'generat' (did you mean 'generate'?)"),
        (["generate", "--model", "x"], "QUESTION"),
        (["evaluate", "--limit", "0"], "argument --limit: '0' is not a whole number above 0"),
        (["schedule", "--pp", "1" * 5000], "is not a whole number"),
        (["schedule", "--micro-batch", "2"], "--micro-batch 2 (did you mean '--micro-batches'?)"),
        (["estimate", "demo_sft", "--seq-lem", "1"], "unknown flag '--seq-lem' (did you mean '--seq-len'?)"),
        (["estimate", "demo_sft", "--images", "nan"], "argument --images: 'nan' is not a number"),
        (["estimate", "demo_sft", "--train.lrr", "1"], "unknown flag '--train.lrr' (did you mean '--train.lr'?)"),
        (["train", "--rank", "2"], "unknown flag '--rank' (did you mean '--ranks'?)"),
        (["train", "--deepspeed", "zero4"], "unknown DeepSpeed file 'zero4' (did you mean 'zero3'?)"),
        (["train", "--ranks", "100000"], "start fewer ranks"),
        (["train", "--parallel.schedule", "zigzag"], "invalid choice: 'zigzag'"),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mma: ") and len(error.splitlines()) == 1 and len(error) < 500
    assert message in error


def test_an_export_can_be_read_by_people(model: Path) -> None:
    card = json.loads((model / "config.json").read_text())["mma"]
    assert card["policy"] == "mma" and card["template"]["name"] == "plain"


def test_the_completion_script_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    flags = {
        "train": "--parallel.schedule", "mask": "--grid", "prove": "--layers", "inspect": "--html", "doctor": "--model",
        "estimate": "--seq-len", "generate": "--device", "slurm": "--force",
    }  # fmt: skip
    for command, flag in flags.items():
        (options,) = [line for line in script.splitlines() if line.startswith(f"_shtab_mma_{command}_option_strings=")]
        assert flag in options.rstrip(")").split()
    assert "_shtab_mma_train___parallel_schedule_choices=(1f1b gpipe interleaved)" in script
