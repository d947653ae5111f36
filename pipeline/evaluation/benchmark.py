"""What a benchmark is: questions read from official files, a prompt, and a metric that grades answers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data_prep.common.errors import UserError
from data_prep.example import ImageRef, Part, Turn


@dataclass(frozen=True)
class Question:
    """One question: the prompt in reading order and the facts that its scorer needs."""

    id: str
    """Unique within the benchmark."""
    parts: tuple[Part, ...]
    """Text and images in reading order."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Reference answer, options, category, ...; JSON values."""
    marks: tuple[str, ...] = ()
    """Text that stands for each image, such as ``<image 1>``, when the template puts all images first."""
    cluster: str = ""
    """Questions that are scored and resampled together (an image pair of MME, a circular group); default: the id."""
    stratum: str = ""
    """Resampling keeps the number of clusters of each stratum (a category, a split)."""

    @property
    def group(self) -> str:
        """The cluster, or the id of a question that stands alone."""
        return self.cluster or self.id

    @property
    def text(self) -> str:
        """The text of the prompt without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def turn(self, *, inline: bool) -> Turn:
        """Return the user turn; unless ``inline``, images come first and their marks stay in the text."""
        if inline or not any(self.marks):
            return Turn("user", self.parts)
        marks = iter(self.marks)
        text = "".join(part if isinstance(part, str) else next(marks, "") for part in self.parts)
        return Turn("user", (*self.images, text))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images in reading order."""
        return tuple(part for part in self.parts if isinstance(part, ImageRef))

    def digest(self, image_hashes: Sequence[str]) -> str:
        """Return the sha256 of what the model sees, with the id; ``image_hashes`` are those of its images."""
        hashes = iter(image_hashes)
        seen = [part if isinstance(part, str) else [next(hashes)] for part in self.parts]
        return hashlib.sha256(json.dumps([self.id, seen, self.marks]).encode()).hexdigest()

    def without_images(self) -> Question:
        """Return the question without its images; scorers need no more, and it takes little memory."""
        return replace(self, parts=tuple(part for part in self.parts if isinstance(part, str)))


@dataclass(frozen=True)
class Grade:
    """How one answer was judged."""

    extracted: str
    """What the extractor read from the answer; empty when it found nothing."""
    credit: float
    """0..1, or the benchmark's own unit."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that the summary needs."""


@dataclass(frozen=True)
class Graded:
    """A question with its answer and grade."""

    question: Question
    answer: str
    grade: Grade


class Judge(Protocol):
    """A language model that reads an answer; see :mod:`pipeline.evaluation.judge`."""

    def ask(self, prompts: Sequence[JudgePrompt]) -> list[str]:
        """Return one reply per prompt. Raises UserError when the judge cannot be reached."""
        ...


@dataclass(frozen=True)
class JudgePrompt:
    """One request to a judge."""

    user: str
    system: str = ""
    max_tokens: int = 1024
    temperature: float = 0.0
    attempt: int = 0
    """Number of earlier replies to the same request that could not be read."""


class Metric(ABC):
    """Grades answers and summarises the grades. ``extractor`` says in one sentence how an answer is read."""

    extractor: ClassVar[str]
    judge_role: ClassVar[str] = ""
    """What a judge does for this metric; empty when none is needed."""

    @abstractmethod
    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Grade all answers of a benchmark, in the order of its file."""

    @abstractmethod
    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the scores; the first is the headline. ``graded`` may hold a question several times."""

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Return the group of a graded answer and its terms; the bootstrap adds them up by group."""
        return "", (one.grade.credit, 1.0)

    def headline(self, totals: Mapping[str, Sequence[float]]) -> float:
        """Return the headline of :meth:`summarize` from the sums of :meth:`terms` by group."""
        credit, count = totals[""]
        return 100 * credit / count if count else 0.0

    def check(self, questions: Sequence[Question]) -> None:  # noqa: B027  # most benchmarks have nothing to check
        """Raise UserError when the questions are not a complete benchmark, for example half of an MME pair."""


class AnswerMetric(Metric):
    """A metric whose answers are graded one by one without a judge."""

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Grade every answer by itself."""
        return [self.grade_one(question, answer) for question, answer in zip(questions, answers, strict=True)]

    @abstractmethod
    def grade_one(self, question: Question, answer: str) -> Grade:
        """Grade one answer."""

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the accuracy in percent, then by ``facts["category"]`` where questions have one."""
        return {"accuracy": percent(graded), **by_fact(graded, "category")}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its files lie, how they are read, what is asked and how it is scored."""

    name: str
    title: str
    folder: str
    """Sub-folder of ``--data``."""
    files: str
    """Expected content of the folder, for messages."""
    prompt: str
    """The prompt in words, stored with the result."""
    rule: str
    """Where the scoring rule comes from, stored with the result."""
    read: Callable[[Path], Iterator[Question]]
    """Yield the questions of the folder in order. Raises UserError naming the file and row that is wrong."""
    metric: Metric
    max_new_tokens: int
    column: str = ""
    """Column of the paper's Table 1; empty for benchmarks that are not in it."""
    clustered: bool = False
    """Whether several questions are scored together."""

    @property
    def in_table(self) -> bool:
        """Whether the paper's Table 1 has this benchmark; ``all`` runs these."""
        return bool(self.column)

    def questions(self, data: Path) -> Iterator[Question]:
        """Yield the questions below the data folder.

        Raises:
            UserError: the benchmark's folder is missing, or a file in it is wrong.
        """
        folder = data / self.folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {self.name} needs {self.files} (docs/evaluation.md)")
        return self.read(folder)


def percent(graded: Sequence[Graded]) -> float:
    """Return the mean credit in percent."""
    return 100 * sum(one.grade.credit for one in graded) / len(graded) if graded else 0.0


def by_fact(graded: Sequence[Graded], fact: str) -> dict[str, float]:
    """Return the mean credit in percent for each value of a fact, sorted by value; empty without that fact."""
    groups: dict[str, list[Graded]] = {}
    for one in graded:
        if value := one.question.facts.get(fact):
            groups.setdefault(str(value), []).append(one)
    return {name: percent(groups[name]) for name in sorted(groups)}
