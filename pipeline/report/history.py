"""What a run folder tells about a run, read without heavy libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import read_bounded
from data_prep.common.yaml_files import read_mapping
from pipeline.config.schema import RunConfig, build_config
from pipeline.training.run.state import RunState

FloatArray = npt.NDArray[np.float64]
_MAX_BYTES = 1 << 30
_HUGE = 1e300
_EVALUATIONS = ("evaluation.json", "export/evaluation.json")


@dataclass(frozen=True)
class Score:
    """Right answers of one family."""

    asked: int
    right: int
    guess: int
    """How many of them the best constant answer gets right."""


@dataclass(frozen=True)
class Evaluation:
    """The answers of a run's model to held-out questions, as ``mma evaluate`` saved them."""

    scores: dict[str, Score]
    answers: Sequence[dict[str, Any]]
    """Each with ``sample``, ``family``, ``reference``, ``answer`` and ``right``."""


@dataclass(frozen=True)
class History:
    """One run."""

    state: RunState
    config: RunConfig
    environment: dict[str, Any]
    steps: Sequence[dict[str, Any]] = field(repr=False)
    """Lines of metrics.jsonl, in order of their steps."""
    damaged_lines: int = 0
    """Lines of metrics.jsonl that cannot be read."""
    evaluation: Evaluation | None = None

    @classmethod
    def read_all(cls, folders: Sequence[Path]) -> list[History]:
        """Read runs, each with its evaluation: ``mma evaluate --compare`` saves two models in the file of the first.

        Raises UserError as :meth:`read` does, and if an evaluation cannot be read.
        """
        runs = [cls.read(folder) for folder in folders]
        found: dict[Path, Evaluation] = {}
        for folder in folders:
            found |= {Path(model).resolve(): evaluation for model, evaluation in _evaluations(folder)}
        return [replace(run, evaluation=_of(run.state.path, found)) for run in runs]

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read a run folder, except its evaluation. Raises UserError if it is none, or its configuration is damaged."""
        state = RunState.read(folder)
        steps, damaged = _metrics(folder / "metrics.jsonl")
        if not steps:
            raise UserError(f"{folder} has trained no step yet: there is nothing to report")
        config = build_config(read_mapping(folder / "config.yaml"), str(folder / "config.yaml"))
        environment = _environment(folder / "env.json")
        return cls(state, config, environment, steps, damaged)

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.state.path.resolve().name

    @property
    def seconds(self) -> float:
        """Time of all its steps, and of waiting for saves."""
        return float(np.nansum(self.series("step_s")) + np.nansum(self.series("save_s")))

    def held_out(self, metric: str) -> tuple[FloatArray, FloatArray]:
        """Return (steps, values) of a metric of `eval.every_steps`, float64[evaluations]; nan where a line lacks it."""
        lines = [line for line in self.steps if isinstance(line.get("eval"), dict) and line["eval"]]
        values = [_number(line["eval"].get(metric)) for line in lines]
        return np.array([float(line["step"]) for line in lines]), np.array(values, dtype=np.float64)

    @property
    def held_out_metrics(self) -> list[str]:
        """The metrics of its evaluations, in the order of the first lines that have them."""
        found = (line["eval"] for line in self.steps if isinstance(line.get("eval"), dict))
        return list(dict.fromkeys(str(metric) for values in found for metric in values))

    def series(self, key: str) -> FloatArray:
        """Return one number per step, float64[steps]; nan where a line lacks it."""
        return np.array([_number(line.get(key)) for line in self.steps], dtype=np.float64)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < _HUGE else np.nan


def _text(path: Path) -> str:
    try:
        return read_bounded(path, _MAX_BYTES).decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a started run") from error


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    found: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in _text(path).splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            found[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    return [found[step] for step in sorted(found)], damaged


def _evaluations(folder: Path) -> Iterator[tuple[str, Evaluation]]:
    """Yield (model folder, its evaluation) of a run's files, oldest file first."""
    paths = [path for path in (folder / name for name in _EVALUATIONS) if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            for model, own in json.loads(_text(path)).items():
                yield model, Evaluation({name: _score(score) for name, score in own["scores"].items()}, own["answers"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): run mma evaluate again") from error


def _score(raw: dict[str, Any]) -> Score:
    return Score(int(raw["asked"]), int(raw["right"]), int(raw["guess"]))


def _of(folder: Path, found: Mapping[Path, Evaluation]) -> Evaluation | None:
    """Return the evaluation of a run's export, or of the run itself."""
    return next((found[place] for place in (folder.resolve() / "export", folder.resolve()) if place in found), None)
