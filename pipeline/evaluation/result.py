"""The result of one benchmark: scores, what they depend on, every graded answer; paired comparison of two models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_prep.common.files import write_atomic
from pipeline.evaluation.answers import Answer, Conditions
from pipeline.evaluation.benchmark import Benchmark, Graded, Judge
from pipeline.evaluation.judge import JudgeSettings
from pipeline.evaluation.survey import Survey

FORMAT, VERSION = "mma-bench-result", 1
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class Result:
    """One benchmark of one model."""

    benchmark: Benchmark
    scores: dict[str, float]
    """The first is the headline."""
    graded: tuple[Graded, ...]
    unanswerable: int
    """Questions that the model could not take; they are scored as empty answers."""
    judge: JudgeSettings | None
    conditions: Conditions
    limit: int | None = None
    """Set when only the first questions were asked: no benchmark score."""

    @property
    def headline(self) -> float:
        """The score that the paper's table shows."""
        return next(iter(self.scores.values()))

    def to_dict(self, model: str) -> dict[str, Any]:
        """Return everything that the scores depend on, as JSON values."""
        one = self.benchmark
        return {
            "format": FORMAT,
            "version": VERSION,
            "benchmark": one.name,
            "title": one.title,
            "model": model,
            "questions": len(self.graded),
            "limit": self.limit,
            "unanswerable": self.unanswerable,
            "scores": self.scores,
            "prompt": one.prompt,
            "extractor": one.metric.extractor,
            "rule": one.rule,
            "judge": asdict(self.judge) if self.judge else None,
            "conditions": asdict(self.conditions),
        }

    def save(self, folder: Path, model: str) -> Path:
        """Write ``result.json`` and every graded answer to ``graded.jsonl``; return the former's path."""
        lines = [
            {
                "id": one.question.id,
                "question": one.question.text,
                "facts": one.question.facts,
                "answer": one.answer,
                "extracted": one.grade.extracted,
                "credit": one.grade.credit,
                **one.grade.extra,
            }
            for one in self.graded
        ]
        write_atomic(folder / "graded.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        write_atomic(folder / "result.json", json.dumps(self.to_dict(model), indent=1).encode() + b"\n")
        return folder / "result.json"


def score(
    benchmark: Benchmark,
    survey: Survey,
    answers: Sequence[Answer],
    conditions: Conditions,
    judge: Judge | None = None,
    settings: JudgeSettings | None = None,
) -> Result:
    """Grade and summarise the answers of a benchmark, given in the order of its file."""
    texts = [answer.answer for answer in answers]
    grades = benchmark.metric.grade(survey.questions, texts, judge)
    graded = tuple(Graded(*one) for one in zip(survey.questions, texts, grades, strict=True))
    unanswerable = sum(bool(answer.problem) for answer in answers)
    judged = settings if benchmark.metric.judge_role else None
    return Result(benchmark, benchmark.metric.summarize(graded), graded, unanswerable, judged, conditions)


@dataclass(frozen=True)
class Difference:
    """Headline of one model minus that of another on the same questions, with a 95 % interval."""

    value: float
    low: float
    high: float


def compare(one: Result, other: Result, *, resamples: int = RESAMPLES, seed: int = SEED) -> Difference:
    """Return the paired bootstrap interval of ``one - other``.

    Clusters (an image pair of MME, a circular group) are drawn with replacement inside their stratum, the same for
    both models, and the headline is computed from each draw. Percentile interval; the same seed gives the same
    interval.
    """
    random = np.random.default_rng(seed)
    strata = _strata(one.graded)
    sums = [[_cluster_sums(result, clusters) for clusters in strata] for result in (one, other)]
    draws = np.empty(resamples)
    for number in range(resamples):
        sizes = [len(clusters) for clusters in strata]
        counts = [np.bincount(random.integers(0, size, size), minlength=size) for size in sizes]
        first, second = (_drawn(result, own, counts) for result, own in zip((one, other), sums, strict=True))
        draws[number] = first - second
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(one.headline - other.headline, float(low), float(high))


Floats: TypeAlias = npt.NDArray[np.float64]
ClusterSums: TypeAlias = tuple[str, Floats]
"""Group of a stratum, and the terms of its clusters, [clusters, terms]."""


def _strata(graded: Sequence[Graded]) -> list[list[list[int]]]:
    """Return question numbers by cluster by stratum."""
    strata: dict[str, dict[str, list[int]]] = {}
    for number, one in enumerate(graded):
        strata.setdefault(one.question.stratum, {}).setdefault(one.question.group, []).append(number)
    return [list(clusters.values()) for clusters in strata.values()]


def _cluster_sums(result: Result, clusters: Sequence[Sequence[int]]) -> ClusterSums:
    terms = [[result.benchmark.metric.terms(result.graded[number]) for number in cluster] for cluster in clusters]
    groups = {group for cluster in terms for group, _ in cluster}
    assert len(groups) == 1, f"a stratum lies in one group, not {groups}"
    return groups.pop(), np.array([np.sum([values for _, values in cluster], axis=0) for cluster in terms])


def _drawn(result: Result, sums: Sequence[ClusterSums], counts: Sequence[npt.NDArray[np.int64]]) -> float:
    """Return the headline when every cluster counts as often as it was drawn."""
    totals: dict[str, Floats] = {}
    for (group, table), drawn in zip(sums, counts, strict=True):
        totals[group] = totals.get(group, 0.0) + drawn @ table
    return result.benchmark.metric.headline({group: total.tolist() for group, total in totals.items()})
