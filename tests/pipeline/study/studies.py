"""A tiny study on the small demo, and a folder of made-up answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.config.flags import parse
from pipeline.study.folder import ANSWERS, VERSION, StudyFolder
from pipeline.study.spec import load_study
from pipeline.training.run.folder import RunFolder

TINY = {
    "data.demo": "", "log.tensorboard": False, "model.llm.config.hidden_size": 32,
    "model.llm.config.intermediate_size": 64, "model.llm.config.num_hidden_layers": 2,
    "model.vision.config.hidden_size": 32, "model.vision.config.intermediate_size": 32, "train.warmup_steps": 0,
    "train.global_batch_size": 6, "checkpoint.every_steps": 1,
}  # fmt: skip


def write_study(folder: Path, demo: Path, **more: Any) -> Path:
    """Write a study of two arms and two seeds; return its file."""
    packs = demo / "packs"
    study = {
        "out": str(folder / "out"),
        "about": "A tiny study.",
        "flags": {**TINY, "data.packs": str(packs / "sft"), "train.steps": 6},
        "stages": {"sft": {"recipe": "demo_sft"}},
        "arms": {"causal": {"set": {"mask.policy": "causal"}}, "mma": {}},
        "baseline": "causal",
        "seeds": [3, 4],
        "held_out": {
            "validation": str(packs / "eval"), "test": str(packs / "eval"), "validation_samples": 12, "evaluations": 2,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**study, **more}, sort_keys=False))
    return folder / "tiny.yaml"


def made_up(
    folder: Path, *, arms: dict[str, float], seeds: int, missing: tuple[str, ...] = (), questions: int = 60
) -> Path:
    """Write a study with finished runs whose answers are drawn: ``arms`` has the share that is right."""
    first = next(iter(arms))
    path = write_study(
        folder, folder / "demo", arms={name: {} for name in arms}, baseline=first, seeds=list(range(10, 10 + seeds)),
        measure={"plain": {}, "adaptive_flow": {"adaptive_flow": True}}, tuning={"lr": [1e-3, 2e-3], "seeds": [1]},
    )  # fmt: skip
    study = StudyFolder(load_study(str(path)))
    generator = np.random.default_rng(0)
    for run in study.runs():  # trials first: the final runs follow from them
        finish(study, run.name, generator, 0.5)
    for run in study.runs():
        if run.kind == "final" and run.label not in missing:
            finish(study, run.name, generator, arms[run.arm])
            sets = {way: answers(generator, arms[run.arm], questions) for way in study.study.measure}
            guesses = {"constant": [True, False] * (questions // 2), "question_only": [True] * questions}
            content = {"version": VERSION, "asked": study.asked(run), "sets": sets, "guesses": guesses, "flops": 2e12}
            (study.run_dir(run) / ANSWERS).write_text(json.dumps(content))
    return path


def answers(generator: np.random.Generator, share: float, questions: int) -> list[dict[str, Any]]:
    return [
        {"sample": f"q{n}", "family": ("count", "colour")[n % 2], "reference": "2", "answer": "3",
         "right": bool(generator.random() < share)}
        for n in range(questions)
    ]  # fmt: skip


def finish(study: StudyFolder, name: str, generator: np.random.Generator, share: float) -> None:
    """Write a finished run."""
    folder = RunFolder(str(study.run_dir(name)))
    folder.create()
    folder.record_start(parse(["--recipe", "demo_sft", "--run-dir", str(folder.path)]).config, world=1, steps=4)
    with (folder.path / "metrics.jsonl").open("w") as stream:
        for step in range(1, 5):
            held_out = {
                "val/loss": 3.0 / step,
                "val/teacher_forced_accuracy": share * step / 4 + generator.random() / 50,
            }
            line = {"step": step, "tokens": 1000, "step_s": 0.5, "memory_gib": None, "eval": held_out}
            stream.write(json.dumps(line) + "\n")
    folder.set_status("done", 4)
