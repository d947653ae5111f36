"""``mma train``: when it starts ranks itself, and when it is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.commands.train import LAUNCHED_BY, TrainCommand
from pipeline.parallel import launch
from tests.launch import environment
from tests.pipeline.training.runs import flags, metrics

RECIPE = ["--recipe", "demo_sft"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", *LAUNCHED_BY):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "variables", "ranks", "rest"),
    [
        pytest.param(RECIPE, {}, 0, RECIPE, id="alone"),
        pytest.param(["--ranks", "1", *RECIPE], {}, 0, RECIPE, id="one"),
        pytest.param(["--ranks=2", *RECIPE], {}, 2, RECIPE, id="two"),
        pytest.param(["--ranks", "2", *RECIPE], {"SLURM_STEP_NUM_TASKS": "1"}, 2, RECIPE, id="a shell of srun"),
        pytest.param(RECIPE, {"RANK": "3", "WORLD_SIZE": "8"}, 0, RECIPE, id="deepspeed"),
        pytest.param(RECIPE, {"SLURM_STEP_NUM_TASKS": "8"}, 0, RECIPE, id="srun"),
        pytest.param(["--ranks", "8", *RECIPE], {"PMI_SIZE": "8"}, 0, RECIPE, id="the same number"),
        pytest.param(["--ranks", "8", "--dry-run"], {}, 0, ["--dry-run=8"], id="dry run"),
        pytest.param(["--ranks", "8", "--dry-run", "4"], {}, 0, ["--dry-run", "4"], id="dry run of others"),
        pytest.param(["--ranks", "8", "--print-config"], {}, 0, ["--print-config"], id="print"),
    ],
)
def test_ranks_are_started_only_where_no_launcher_has(
    words: list[str], variables: dict[str, str], ranks: int, rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert TrainCommand.parse(words) == TrainCommand(rest, ranks)


def test_every_gpu_gets_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert TrainCommand.parse(RECIPE).ranks == 4


def test_another_number_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match="a launcher has started 8 ranks: drop --ranks"):
        TrainCommand.parse(["--ranks", "2"])


def test_every_launcher_is_known() -> None:
    assert {names["WORLD_SIZE"] for names in launch._LAUNCHERS.values()} < set(LAUNCHED_BY)


@pytest.mark.slow
def test_one_command_trains_on_two_ranks_and_prints_no_launcher_lines(small_demo: Path, tmp_path: Path) -> None:
    """The same steps as the deepspeed command, which other tests run; an error of the start is one line."""
    words = flags(small_demo, tmp_path / "run", "--train.steps", "2")
    words[words.index("--deepspeed") + 1] = "zero3"
    command = [sys.executable, "-m", "pipeline.cli", "train", "--ranks", "2"]
    kept = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=kept, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "done at step 2/2" in done.stdout and "[INFO]" not in done.stdout and "[WARNING]" not in done.stdout
    assert len(metrics(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/env.json").read_text())["ranks"] == 2
    assert "RANK" not in os.environ
