"""``mma demo``: every step once, on the built-in demo data, with the commands a user would type."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.commands.train import check_ranks
from pipeline.config.recipes import load_config
from pipeline.masks import get_policy
from pipeline.parallel.partition import split_layers
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.state import format_duration

DATA, RUNS = Path("data/demo"), Path("runs")


@dataclass(frozen=True)
class Stage:
    """One training run of the demo."""

    run: str
    recipe: str
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return RUNS / self.run

    @property
    def export(self) -> Path:
        """The folder of the exported model."""
        return self.folder / "export"


def stages_of(pp: int, policy: str | None = None) -> list[Stage]:
    """Return the runs: PT, SFT with MMA, and the same SFT under another mask policy. Each ``pp`` has its own folders.

    A pipeline accumulates the same micro-batches in the same order, so its answers equal those of one stage exactly.
    Raises UserError for an unknown policy.
    """
    end = f"_pp{pp}" if pp > 1 else ""
    grid = ("--parallel.pp", str(pp)) if pp > 1 else ()
    pt = Stage(f"demo_pt{end}", "demo_pt", grid)
    sft = Stage(f"demo_sft{end}", "demo_sft", (*grid, "--init-from", str(pt.folder)))
    if not policy:
        return [pt, sft]
    get_policy(policy)
    return [pt, sft, Stage(f"demo_sft_{policy}{end}", "demo_sft", (*sft.flags, "--mask.policy", policy))]


def demo(options: argparse.Namespace) -> int:
    """Run the demo; return 0. Raises UserError if a step fails."""
    began, ranks = time.monotonic(), options.ranks or max(options.pp, default_ranks())
    _check_grid(options.pp, ranks)
    stages = stages_of(options.pp, options.compare)
    _call(["mma-prep", "demo", str(DATA)], "draw the images and pack the data")
    for stage in stages:
        _train(stage, ranks)
    for stage in stages[1:]:
        if not (stage.export / "config.json").is_file():
            _call(["mma", "export", str(stage.folder), str(stage.export)], f"export {stage.run}")
    _measure(stages)
    measured = [str(stage.folder) for stage in stages[1:]]
    _call(["mma", "report", *measured, "--packs", str(DATA / "packs" / "eval")], "one page about the run")
    sft, plain = stages[1], stages_of(1)[1]
    if sft != plain:
        print(f"\n{same_answers(sft.export, plain.export)}")
    print(f"\nall done in {format_duration(time.monotonic() - began)}")
    made = {"data": DATA, "packs": DATA / "packs", "run": sft.folder, "model": sft.export}
    for name, path in {**made, "report": sft.folder / "report.html"}.items():
        print(f"  {name:6} {path}")
    return 0


def _check_grid(pp: int, ranks: int) -> None:
    """Raise UserError for a grid that the trainer would refuse, before minutes of drawing data."""
    check_ranks(ranks)
    if ranks % pp:
        raise UserError(f"--pp {pp} does not divide --ranks {ranks}: make --ranks a multiple of --pp")
    split_layers(load_config("demo_pt").model.llm.config["num_hidden_layers"], pp)


def default_ranks() -> int:
    """Return 2, or 1 on a machine with a single GPU."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def _train(stage: Stage, ranks: int) -> None:
    if RunFolder(str(stage.folder)).status().get("state") == "done":
        print(f"\n# {stage.run} is already trained ({stage.folder}); delete the folder to train again")
        return
    words = ["--ranks", str(ranks), "--recipe", stage.recipe, "--run-dir", str(stage.folder), *stage.flags]
    _call(["mma", "train", *words], f"train {stage.run} on {ranks} ranks")


def _measure(stages: Sequence[Stage]) -> None:
    model = str(stages[1].export)
    compare = [word for stage in stages[2:] for word in ("--compare", str(stage.export))]
    packs = DATA / "packs" / "eval"
    _call(["mma", "evaluate", "--model", model, "--packs", str(packs), *compare], "held-out accuracy")
    image, question, answer = held_out_example()
    _call(["mma", "generate", str(image), question, "--model", model], f"a held-out question (truth: {answer})")


def same_answers(model: Path, other: Path) -> str:
    """Report how many held-out answers of two evaluated models are equal."""
    if not (other / "evaluation.json").is_file():
        return f"{other} does not exist, so there is nothing to compare: run mma demo without --pp first"
    ours, theirs = _answers(model), _answers(other)
    if [answer["sample"] for answer in ours] != [answer["sample"] for answer in theirs]:
        return f"{other} was evaluated on different questions, so there is nothing to compare"
    same = sum(left["answer"] == right["answer"] for left, right in zip(ours, theirs, strict=True))
    return f"answers equal to those of {other}: {same} of {len(ours)} ({same / len(ours):.1%})"


def _answers(model: Path) -> list[dict[str, str]]:
    found = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
    return list(found[str(model)]["answers"])


def held_out_example() -> tuple[Path, str, str]:
    """Return the image file, the question and the true answer of the first held-out sample."""
    raw = DATA / "raw"
    asked = json.loads((raw / "vqav2/val_questions.json").read_text(encoding="utf-8"))["questions"][0]
    told = json.loads((raw / "vqav2/val_annotations.json").read_text(encoding="utf-8"))["annotations"][0]
    image = raw / "images/val" / f"COCO_val2014_{asked['image_id']:012d}.jpg"
    return image, asked["question"], told["multiple_choice_answer"]


def _call(command: list[str], what: str) -> None:
    """Print and run one command as a user would, without the launcher's own log lines."""
    print(f"\n# {what}\n$ {shlex.join(command)}", flush=True)
    beside = Path(sys.executable).parent / command[0]  # of this installation, whatever PATH says
    program = str(beside) if beside.is_file() else shutil.which(command[0]) or command[0]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [program, *command[1:]], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if not noise(line):
            print(line, end="", flush=True)
    if process.wait():
        raise UserError(
            f"'{what}' failed with exit code {process.returncode}: fix the error above, then run mma demo again"
        )


def noise(line: str) -> bool:
    """Return whether a line is one of the launcher's own log lines."""
    log_line = line.startswith(("[20", "[rank", "W1", "I1")) and ("[INFO]" in line or "[WARNING]" in line)
    return log_line or not line.strip()
