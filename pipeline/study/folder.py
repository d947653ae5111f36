"""The files of a study: its runs, their answers, and what is done."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import hash_json, write_atomic
from data_prep.common.folder_lock import FolderLock
from data_prep.packs import Manifest
from pipeline.config.recipes import load_config
from pipeline.study.graph import Run, as_word, runs_of
from pipeline.study.spec import Study
from pipeline.training.run.best import ACCURACY, evaluations_up_to
from pipeline.training.run.folder import DIVERGED, RunFolder

ANSWERS = "answers.json"
DEFINITION = "definition.json"
VERSION = 1


@dataclass(frozen=True)
class StudyFolder:
    """The output folder of a study."""

    study: Study

    @cached_property
    def path(self) -> Path:
        """The folder."""
        return Path(self.study.out)

    def run_dir(self, run: Run | str) -> Path:
        """Return the folder of a run, or of a run's name."""
        return self.path / (run if isinstance(run, str) else run.name)

    def lock(self, run: Run) -> FolderLock:
        """Return the lock that a process holds while it makes a run, answers included."""
        return FolderLock(
            self.path / "locks" / f"{run.kind}.{run.label}",
            busy="{folder} is used by {holder}", once="start this study once at a time",
        )  # fmt: skip

    def command(self, run: Run) -> list[str]:
        """Return the flags of ``mma train`` for a run. Raises UserError if its packs are missing or too few."""
        steps, one_pass = self._steps(run)
        words = [
            *run.words(),
            *self._length(run, steps, one_pass),
            *self._evaluation(run, steps),
            "--recipe",
            self.study.stages[run.stage].recipe,
        ]
        if run.after:
            words += ["--init-from", str(self.run_dir(run.after))]
        return [*words, "--run-dir", str(self.run_dir(run)), "--ranks", str(self.study.ranks)]

    def _steps(self, run: Run) -> tuple[int, int]:
        """Return (steps, steps of one pass over the rows). Raises UserError if the rows do not make a step."""
        from pipeline.planning.run_plan import count_steps

        stage = self.study.stages[run.stage]
        overrides = [(key, as_word(value)) for key, value in run.settings]
        config = load_config(stage.recipe, overrides)
        manifest = Manifest.load(config.data.packs)
        by_rows = config.train.model_copy(update={"steps": 0, "epochs": 0.0, "decay_steps": 0})
        one_pass = count_steps(config.model_copy(update={"train": by_rows}), manifest)
        if not stage.tokens:
            return count_steps(config, manifest), one_pass
        tokens_per_step = manifest.tokens / manifest.rows * config.train.global_batch_size
        return max(1, round(stage.tokens / tokens_per_step)), one_pass

    def _length(self, run: Run, steps: int, one_pass: int) -> list[str]:
        if not self.study.stages[run.stage].tokens:
            return []
        if steps <= one_pass:
            return ["--train.steps", str(steps), "--train.epochs", "0"]
        return ["--train.steps", "0", "--train.epochs", repr(steps / one_pass)]

    def _evaluation(self, run: Run, steps: int) -> list[str]:
        """Return the flags of the evaluations: only an arm's last stage has them."""
        if run.kind == "stages":
            return []
        held_out, folder = self.study.held_out, self.study.validation_folder(run.arm)
        every = max(1, steps // held_out.evaluations)
        words = ["--eval.packs", f"val={folder}", "--eval.every-steps", str(every)]
        return [*words, "--eval.samples", str(held_out.validation_samples)]

    def define(self, run: Run, command: list[str]) -> None:
        """Record how a run is made."""
        path = self.run_dir(run) / DEFINITION
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"made": _made(command), "command": command}, indent=1).encode() + b"\n")

    def check(self, run: Run) -> None:
        """Check that a run, if it was ever started, was made as the study says now. Raises UserError if not."""
        path = self.run_dir(run) / DEFINITION
        before = _json(path).get("made")
        if before is not None and before != _made(self.command(run)):
            raise UserError(f"{path.parent} was made with other settings: name another 'out', or remove that folder")

    def is_trained(self, run: Run | str) -> bool:
        """Whether a run has reached its last step."""
        return RunFolder(str(self.run_dir(run))).status().get("state") == "done"

    def has_diverged(self, run: Run) -> bool:
        """Whether a run ended because it diverged. For a trial that is a result: its rate is too high."""
        status = RunFolder(str(self.run_dir(run))).status()
        return status.get("state") == "failed" and status.get("reason") == DIVERGED

    def is_done(self, run: Run) -> bool:
        """Whether nothing is left to do for a run."""
        if run.kind == "tuning" and self.has_diverged(run):
            return True
        return self.is_trained(run) and (run.kind != "final" or self.answers(run) is not None)

    def asked(self, run: Run) -> dict[str, Any]:
        """Return what the study asks a final run, and how: answers to anything else are not its answers."""
        ways = {name: spec.model_dump() for name, spec in self.study.measure.items()}
        return {"ways": ways, "test": self.study.test_folder(run.arm), "test_samples": self.study.held_out.test_samples}

    def answers(self, run: Run) -> dict[str, Any] | None:
        """Return the saved answers of a final run; None if there are none to what the study asks now."""
        found = _json(self.run_dir(run) / ANSWERS)
        return found if found.get("version") == VERSION and found.get("asked") == self.asked(run) else None

    def curve(self, run: Run) -> list[tuple[int, dict[str, float]]]:
        """Return the evaluations of a run: (step, metrics)."""
        return evaluations_up_to(self.run_dir(run) / "metrics.jsonl", 1 << 60)

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        """Return the lines of a finished run's metrics.jsonl."""
        text = (self.run_dir(run) / "metrics.jsonl").read_bytes()
        return [json.loads(line) for line in text.splitlines()]

    def trials(self, arm: str) -> dict[float, list[float]]:
        """Return the last validation value of every finished trial of an arm, by rate; NaN where it diverged."""
        metric = f"val/{ACCURACY if self.study.tuning.metric == 'teacher_forced_accuracy' else 'loss'}"
        found: dict[float, list[float]] = {lr: [] for lr in self.study.tuning.lr}
        for run in runs_of(self.study, {}):
            if run.kind == "tuning" and run.arm == arm and run.lr is not None and self.is_done(run):
                curve = [] if self.has_diverged(run) else self.curve(run)
                found[run.lr].append(curve[-1][1].get(metric, math.nan) if curve else math.nan)
        return found

    def chosen(self) -> dict[str, float | None]:
        """Return the rate of every arm whose trials are finished; None = the recipe's."""
        tuning = self.study.tuning
        if len(tuning.lr) < 2:
            return dict.fromkeys(self.study.arms, tuning.lr[0] if tuning.lr else None)
        trials = {arm: self.trials(arm) for arm in self.study.arms}
        return {
            arm: best_rate(values, higher=tuning.metric != "loss")
            for arm, values in trials.items()
            if all(len(of_rate) == len(tuning.seeds) for of_rate in values.values())
        }

    def runs(self, arms: Collection[str] = ()) -> list[Run]:
        """Return all runs that are known by now, each after the one it needs; with ``arms`` only what these need."""
        known = runs_of(self.study, self.chosen())
        names: set[str] = set()
        for run in reversed(known):
            if not arms or run.arm in arms or run.name in names:
                names |= {run.name, run.after}
        return [run for run in known if run.name in names]

    @property
    def total(self) -> int:
        """The number of all runs, those included whose rate is not chosen yet."""
        return len(runs_of(self.study, dict.fromkeys(self.study.arms, None)))


def best_rate(trials: Mapping[float, list[float]], *, higher: bool) -> float:
    """Return the rate with the best mean; of equal means the lowest rate. A trial that is not finite is the worst."""

    def badness(lr: float) -> tuple[float, float]:
        mean = float(np.mean(trials[lr]))
        return (math.inf if not math.isfinite(mean) else -mean if higher else mean), lr

    return min(trials, key=badness)


def _made(command: list[str]) -> str:
    return hash_json([command[:-1], VERSION])  # the ranks may change: the result does not depend on them


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
