"""``mma demo``: the whole way once, on the built-in world, with the commands a user would type."""

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

from data_prep.errors import UserError
from pipeline.masks import get_policy
from pipeline.parallel.groups import free_port
from pipeline.training.durations import clock
from pipeline.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
DATA, RUNS = Path("data/demo"), Path("runs")
DESCRIPTION = """\
Draw a small world, tokenize and pack it, pre-train on its captions, instruction-tune with Modality-Mutual Attention,
export the model, measure it on held-out scenes and ask it a question. Every step is an ordinary command, printed
before it runs; steps that are done already are skipped, an interrupted one resumes."""


@dataclass(frozen=True)
class Stage:
    """One training run of the demo."""

    run: str
    recipe: str
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return RUNS / self.run

    @property
    def export(self) -> Path:
        """Where its model is exported to."""
        return self.folder / "export"


PT = Stage("demo_pt", "demo_pt")
MMA = Stage("demo_sft", "demo_sft", ("--init-from", str(PT.folder)))


def twin(policy: str) -> Stage:
    """Return the same SFT run under another mask policy."""
    get_policy(policy)
    return Stage(f"demo_sft_{policy}", "demo_sft", (*MMA.flags, "--mask.policy", policy))


def demo_command(argv: Sequence[str]) -> int:
    """Run the demo; return 0. Raises UserError when a step fails."""
    parser = argparse.ArgumentParser("mma demo", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="training processes (default: 2, or 1 on a single GPU)")
    parser.add_argument("--compare", metavar="POLICY", help="train a twin of the SFT run under this policy: causal")
    options = parser.parse_args(list(argv))
    began, ranks = time.monotonic(), options.ranks or default_ranks()
    stages = [PT, MMA, *([twin(options.compare)] if options.compare else [])]
    _call(["mma-prep", "demo", str(DATA)], "draw the world and pack it")
    for stage in stages:
        _train(stage, ranks)
    for stage in stages[1:]:
        if not (stage.export / "config.json").is_file():
            _call(["mma", "export", str(stage.folder), str(stage.export)], f"export {stage.run}")
    _measure(stages)
    print(f"\nall done in {clock(time.monotonic() - began)}")
    for name, path in {"data": DATA, "packs": DATA / "packs", "run": MMA.folder, "model": MMA.export}.items():
        print(f"  {name:6} {path}")
    return 0


def default_ranks() -> int:
    """Two processes, but not more than there are GPUs, where there are any."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def _train(stage: Stage, ranks: int) -> None:
    if RunFolder(str(stage.folder)).status().get("state") == "done":
        print(f"\n# {stage.run} is trained already ({stage.folder}); remove the folder to train it again")
        return
    flags = ["--deepspeed", shown(ROOT / "ds_configs/zero3.json"), "--recipe", stage.recipe]
    launch = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [*launch, shown(ROOT / "pipeline/train.py"), *flags, "--run-dir", str(stage.folder), *stage.flags]
    _call(command, f"train {stage.run} on {ranks} ranks")


def shown(path: Path) -> str:
    """Return a path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _measure(stages: Sequence[Stage]) -> None:
    compare = [word for stage in stages[2:] for word in ("--compare", str(stage.export))]
    packs = DATA / "packs" / "eval"
    _call(["mma", "evaluate", "--model", str(MMA.export), "--packs", str(packs), *compare], "held-out accuracy")
    image, question, answer = held_out_example()
    _call(
        ["mma", "generate", str(image), question, "--model", str(MMA.export)], f"a held-out question (truth: {answer})"
    )


def held_out_example() -> tuple[Path, str, str]:
    """Return the image file, the question and the true answer of the first held-out sample."""
    raw = DATA / "raw"
    asked = json.loads((raw / "vqav2/val_questions.json").read_text(encoding="utf-8"))["questions"][0]
    told = json.loads((raw / "vqav2/val_annotations.json").read_text(encoding="utf-8"))["annotations"][0]
    image = raw / "images/val" / f"COCO_val2014_{asked['image_id']:012d}.jpg"
    return image, asked["question"], told["multiple_choice_answer"]


def _call(command: list[str], what: str) -> None:
    """Print and run one command as a user would; the launcher's own log lines are left out."""
    print(f"\n# {what}\n$ {shlex.join(command)}", flush=True)
    program = shutil.which(command[0]) or str(Path(sys.executable).parent / command[0])
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
            f"'{what}' ended with exit code {process.returncode}: mend what it says above, then run mma demo again"
        )


def noise(line: str) -> bool:
    """Whether a line is the launcher's own chatter."""
    chatter = line.startswith(("[20", "[rank", "W1", "I1")) and ("[INFO]" in line or "[WARNING]" in line)
    return chatter or not line.strip()
