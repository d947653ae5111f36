"""Runs benchmarks on one or two models: read and check everything first, then ask, score, compare and save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.evaluation.answers import AnswerStore, Conditions
from pipeline.evaluation.asking import Asking, Model, model_hash
from pipeline.evaluation.benchmark import Benchmark
from pipeline.evaluation.judge import ApiJudge, JudgeSettings
from pipeline.evaluation.result import Result, compare, score
from pipeline.evaluation.survey import Survey
from pipeline.evaluation.table import Line


@dataclass(frozen=True)
class Settings:
    """How benchmarks are run."""

    data: Path
    judge: JudgeSettings | None = None
    shard: tuple[int, int] = (0, 1)
    limit: int | None = None
    """Ask only the first questions; such answers are kept apart from those of a full run."""
    batch: int = 16
    max_new_tokens: int | None = None
    """Instead of each benchmark's own limit."""


@dataclass(frozen=True)
class Candidate:
    """A model to be measured: its export, where its answers go, and how it is loaded."""

    folder: Path
    out: Path
    loader: Callable[[], Model]

    @cached_property
    def hash(self) -> str:
        """Sha256 over the export's files."""
        return model_hash(self.folder)

    @cached_property
    def model(self) -> Model:
        """The loaded model; loaded on first use."""
        return self.loader()


@dataclass
class Outcome:
    """What a run has measured, what it skipped, and what other shards still have to answer."""

    lines: list[Line] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)


def surveys(
    benchmarks: Sequence[Benchmark], settings: Settings, *, skip: bool
) -> tuple[Mapping[str, Survey], dict[str, str]]:
    """Read every benchmark once, so that a missing or damaged file is found before hours of generation.

    Args:
        benchmarks: in the order they will be run.
        settings: where the files are, and whether there is a judge.
        skip: leave out what cannot be run (``all``) instead of refusing it.

    Returns:
        The surveys by benchmark, and the reason for each benchmark left out.

    Raises:
        UserError: a file is damaged; or, unless ``skip``, a folder is missing or a judge is needed.
    """
    found: dict[str, Survey] = {}
    skipped: dict[str, str] = {}
    for one in benchmarks:
        if reason := _obstacle(one, settings):
            if not skip:
                raise UserError(f"{one.name}: {reason}")
            skipped[one.name] = reason
            continue
        found[one.name] = Survey.of(one, settings.data, settings.limit)
    if not found:
        raise UserError(
            f"{settings.data}: no benchmark can be run: " + "; ".join(f"{k}: {v}" for k, v in skipped.items())
        )
    return found, skipped


def _obstacle(benchmark: Benchmark, settings: Settings) -> str:
    if benchmark.metric.judge_role and settings.judge is None:
        return f"needs a judge that {benchmark.metric.judge_role}: give --judge-url and --judge-model"
    folder = settings.data / benchmark.folder
    return "" if folder.is_dir() else f"no folder {folder}; it needs {benchmark.files} (docs/evaluation.md)"


def run(
    benchmarks: Sequence[Benchmark],
    candidates: Sequence[Candidate],
    settings: Settings,
    say: Callable[[str], None],
    *,
    skip: bool = False,
) -> Outcome:
    """Measure one model, or two on the same questions.

    Args:
        benchmarks: what to measure.
        candidates: one model, or the model and the one it is compared with.
        settings: data, judge, shard and limits.
        say: receives a line when answers start afresh or other shards are unfinished.
        skip: as in :func:`surveys`.

    Returns:
        One line per benchmark that is complete.

    Raises:
        UserError: a benchmark cannot be run, or a model cannot be asked. Answers so far are kept.
    """
    surveyed, skipped = surveys(benchmarks, settings, skip=skip)
    outcome = Outcome(skipped=skipped)
    for one in benchmarks:
        if one.name not in surveyed:
            continue
        results = [_measure(one, surveyed[one.name], candidate, settings, say) for candidate in candidates]
        complete = [result for result in results if result is not None]
        if len(complete) < len(candidates):
            outcome.unfinished.append(one.name)
        elif len(complete) == 1:
            outcome.lines.append(Line(complete[0]))
        else:
            outcome.lines.append(Line(complete[0], complete[1], compare(complete[0], complete[1])))
    return outcome


def _measure(
    benchmark: Benchmark, survey: Survey, candidate: Candidate, settings: Settings, say: Callable[[str], None]
) -> Result | None:
    folder = candidate.out / (benchmark.name if settings.limit is None else f"{benchmark.name}-first-{settings.limit}")
    new_tokens = settings.max_new_tokens or benchmark.max_new_tokens
    conditions = Conditions(candidate.hash, survey.prompt_hash, survey.data_hash, f"greedy, {new_tokens} new tokens")
    store = AnswerStore(folder, conditions, say)
    asking = Asking(benchmark, settings.data, survey, store, settings.limit)
    answers = asking.run(lambda: candidate.model, settings.shard, batch=settings.batch, max_new_tokens=new_tokens)
    if answers is None:
        left = len(store.missing(survey.hashes))
        say(
            f"{benchmark.name}: shard {settings.shard[0]}/{settings.shard[1]} is done, other shards have {left} of "
            f"{len(survey.hashes)} questions left; the last one writes the result"
        )
        return None
    judge = ApiJudge(settings.judge, folder / "judge.jsonl") if settings.judge and benchmark.metric.judge_role else None
    scored = score(benchmark, survey, answers, conditions, judge, settings.judge)
    result = replace(scored, limit=settings.limit)
    result.save(folder, str(candidate.folder))
    return result
