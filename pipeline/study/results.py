"""What a study has found so far: one tree of numbers, from answers and evaluations, without times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.common.errors import UserError
from pipeline.study.folder import StudyFolder
from pipeline.study.graph import Run
from pipeline.study.statistics import FloatArray, estimate, holm, permutation_p, smallest_p
from pipeline.training.run.best import ACCURACY

ALPHA = 0.05
"""Two arms are called separated at this level, all comparisons of the study together."""


@dataclass(frozen=True)
class ArmData:
    """The finished runs of one arm."""

    name: str
    runs: Mapping[int, Run]
    """By seed."""
    answers: Mapping[int, dict[str, Any]]

    @property
    def seeds(self) -> list[int]:
        """Seeds with answers, ascending."""
        return sorted(self.answers)

    def right(self, way: str, seeds: Sequence[int] | None = None) -> FloatArray:
        """Return float64[S, Q]: 1 where the run of a seed answered right, in order of `keys`."""
        return np.array(
            [[float(answer["right"]) for answer in self._ordered(seed, way)] for seed in seeds or self.seeds],
            dtype=np.float64,
        )

    def _ordered(self, seed: int, way: str) -> list[dict[str, Any]]:
        return sorted(self.answers[seed]["sets"][way], key=_question)

    def keys(self, seed: int, way: str) -> list[tuple[str, str]]:
        """Return (sample, family) of the questions."""
        return [_question(answer) for answer in self._ordered(seed, way)]

    def guesses(self) -> dict[str, FloatArray]:
        """Return float64[Q] of each guess that sees no picture, in order of `keys`."""
        first = self.answers[self.seeds[0]]
        asked = next(iter(first["sets"].values()))
        order = sorted(range(len(asked)), key=lambda at: _question(asked[at]))
        return {name: np.array([float(right[at]) for at in order]) for name, right in first["guesses"].items()}


def _question(answer: Mapping[str, Any]) -> tuple[str, str]:
    return str(answer["sample"]), str(answer["family"])


def arms_of(folder: StudyFolder) -> dict[str, ArmData]:
    """Read the answers of all finished runs. Raises UserError if two runs were asked different questions."""
    found: dict[str, tuple[dict[int, Run], dict[int, dict[str, Any]]]] = {arm: ({}, {}) for arm in folder.study.arms}
    for run in folder.runs():
        if run.kind == "final":
            found[run.arm][0][run.seed] = run
            answers = folder.answers(run)
            if answers is not None:
                found[run.arm][1][run.seed] = answers
    arms = {name: ArmData(name, *parts) for name, parts in found.items()}
    _check_questions(folder, arms)
    return arms


def _check_questions(folder: StudyFolder, arms: Mapping[str, ArmData]) -> None:
    ways = list(folder.study.measure)
    lists = [
        (f"{arm.name}-s{seed}", arm.keys(seed, way)) for arm in arms.values() for seed in arm.seeds for way in ways
    ]
    for name, keys in lists[1:]:
        if keys != lists[0][1]:
            raise UserError(f"{name} was asked other questions than {lists[0][0]}: remove {folder.path}/final/{name}")


def results(folder: StudyFolder) -> dict[str, Any]:
    """Return all numbers of the study so far; JSON types only.

    Raises UserError if a run was made with other settings than the study's, or asked other questions than the others.
    """
    for run in folder.runs():
        folder.check(run)
    study, arms = folder.study, arms_of(folder)
    finished = {name: arm for name, arm in arms.items() if arm.seeds}
    found: dict[str, Any] = {
        "about": study.about,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "guesses": {},
        "arms": {name: _arm(folder, arm) for name, arm in arms.items()},
        "comparisons": _comparisons(folder, finished),
    }
    if finished:
        first = next(iter(finished.values()))
        families = _families(first, next(iter(study.measure)))
        found["questions"] = {name: int(of.sum()) for name, of in families.items()}
        found["guesses"] = {
            name: {family: float(right[of].mean()) for family, of in families.items()}
            for name, right in first.guesses().items()
        }
    return found


def _families(arm: ArmData, way: str) -> dict[str, Any]:
    """Return bool[Q] of each family, and of all."""
    names = np.array([family for _, family in arm.keys(arm.seeds[0], way)])
    families = {str(name): names == name for name in sorted(set(names.tolist()))}
    return {"all": np.ones(len(names), dtype=bool), **families}


def _arm(folder: StudyFolder, arm: ArmData) -> dict[str, Any]:
    spec = folder.study.arms[arm.name]
    trials = folder.trials(arm.name) if len(folder.study.tuning.lr) > 1 else {}
    found: dict[str, Any] = {
        "about": spec.about,
        "lr": folder.chosen().get(arm.name),
        "trials": {f"{lr:g}": [_finite(value) for value in values] for lr, values in trials.items()},
        "seeds": arm.seeds,
        "missing": [seed for seed in folder.study.seeds if seed not in arm.answers],
        "ways": {},
        "teacher_forced": _last(folder, arm),
        "curve": _curve(folder, arm),
    }
    for way in folder.study.measure if arm.seeds else ():
        right, families = arm.right(way), _families(arm, way)
        found["ways"][way] = {name: asdict(estimate(right[:, of])) for name, of in families.items()}
        found["ways"][way]["of_seeds"] = {str(s): float(m) for s, m in zip(arm.seeds, right.mean(1), strict=True)}
    return found


def _comparisons(folder: StudyFolder, arms: Mapping[str, ArmData]) -> list[dict[str, Any]]:
    """Compare every arm with the baseline, on the seeds and the questions that both have.

    Holm's correction covers all comparisons of the study from the start: one that is missing yet counts with p = 1.
    """
    study, way = folder.study, next(iter(folder.study.measure))
    if study.baseline not in arms:
        return []
    base, found = arms[study.baseline], []
    for name, arm in arms.items():
        shared = [seed for seed in arm.seeds if seed in base.answers]
        if name == study.baseline or not shared:
            continue
        differences = arm.right(way, shared) - base.right(way, shared)
        p_value = permutation_p(differences.mean(1))
        found.append({"arm": name, "seeds": shared, "p": p_value, **asdict(estimate(differences))})
    p_values = [entry["p"] for entry in found]
    p_values += [1.0] * (len(study.arms) - 1 - len(found))
    for at, (entry, adjusted) in enumerate(zip(found, holm(p_values), strict=False)):
        entry["p_holm"] = adjusted
        best = [*p_values[:at], smallest_p(len(entry["seeds"])), *p_values[at + 1 :]]
        entry["smallest_p_holm"] = holm(best)[at]  # if all of its seeds had agreed
        entry["separated"] = adjusted <= ALPHA
    return found


def _curves(folder: StudyFolder, arm: ArmData) -> Iterator[list[tuple[int, dict[str, float]]]]:
    for run in arm.runs.values():
        if folder.is_trained(run) and (curve := folder.curve(run)):
            yield curve


def _last(folder: StudyFolder, arm: ArmData) -> float | None:
    """Return the mean teacher-forced accuracy of the finished runs on the validation rows, under the training mask."""
    values = [curve[-1][1].get(f"val/{ACCURACY}", math.nan) for curve in _curves(folder, arm)]
    return _finite(float(np.mean(values))) if values else None


def _curve(folder: StudyFolder, arm: ArmData) -> list[dict[str, Any]]:
    """Return the means over finished runs of the validation metrics, by step and tokens of the last stage."""
    of_steps: dict[int, list[dict[str, float]]] = {}
    for curve in _curves(folder, arm):
        for step, values in curve:
            of_steps.setdefault(step, []).append(values)
    tokens = _tokens(folder, arm)
    return [
        {
            "step": step,
            "tokens": tokens.get(step),
            "runs": len(found),
            "loss": _finite(float(np.mean([values.get("val/loss", math.nan) for values in found]))),
            "teacher_forced": _finite(float(np.mean([values.get(f"val/{ACCURACY}", math.nan) for values in found]))),
        }
        for step, found in sorted(of_steps.items())
    ]


def _tokens(folder: StudyFolder, arm: ArmData) -> dict[int, int]:
    """Return the tokens trained on up to each step, from the first finished run: all have the same rows."""
    for run in arm.runs.values():
        if folder.is_trained(run):
            lines = folder.metrics(run)
            sums = np.cumsum([line["tokens"] for line in lines])
            return {line["step"]: int(total) for line, total in zip(lines, sums, strict=True)}
    return {}


def costs(folder: StudyFolder) -> dict[str, dict[str, float | int | None]]:
    """Return the costs of each arm's last stage: means over its finished runs, but the largest memory of all."""
    found: dict[str, dict[str, float | int | None]] = {}
    for name, arm in arms_of(folder).items():
        lines = [folder.metrics(arm.runs[seed]) for seed in arm.seeds]
        if not lines:
            continue
        memory = [float(line["memory_gib"]) for run in lines for line in run if line.get("memory_gib")]
        found[name] = {
            "runs": len(lines),
            "step_hours": float(np.mean([sum(line["step_s"] for line in run) for run in lines])) / 3600,
            "tokens": int(np.mean([sum(line["tokens"] for line in run) for run in lines])),
            "flops": float(np.mean([arm.answers[seed]["flops"] for seed in arm.seeds])),
            "memory_gib": max(memory) if memory else None,
        }
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
