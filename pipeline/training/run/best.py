"""The best evaluation of a run by one metric."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

ACCURACY = "teacher_forced_accuracy"
"""Share of answers all of whose tokens are the most likely ones, each given the true tokens before it. It equals the
share that greedy decoding writes token for token."""


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far; of equal values the earliest."""

    metric: str
    value: float
    step: int

    @classmethod
    def of(cls, metric: str, evaluations: list[tuple[int, dict[str, float]]]) -> Best | None:
        """Return the best of evaluations (step, metrics) in order; None where the metric is nowhere finite."""
        best = None
        for step, values in evaluations:
            best = cls.after(best, metric, step, values)
        return best

    @classmethod
    def after(cls, best: Best | None, metric: str, step: int, values: dict[str, float]) -> Best | None:
        """Return ``best``, or the evaluation of ``step`` if it is better."""
        value = values.get(metric, math.nan)
        if not math.isfinite(value) or (best is not None and not _better(metric, value, best.value)):
            return best
        return cls(metric, value, step)


def _better(metric: str, value: float, than: float) -> bool:
    return value > than if ACCURACY in metric.split("/") else value < than


def evaluations_up_to(path: Path, step: int) -> list[tuple[int, dict[str, float]]]:
    """Return (step, metrics) of the evaluations in a metrics file up to a step; damaged lines are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            if entry["step"] <= step and entry.get("eval"):
                values = {str(name): float(value) for name, value in entry["eval"].items() if value is not None}
                found.append((int(entry["step"]), values))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found
