"""CV-Bench: counting and relation in 2D (ADE20K, COCO), depth and distance in 3D (Omni3D)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import AnswerMetric, Benchmark, Grade, Graded, Question, by_fact, percent
from pipeline.evaluation.extract import leading_letter
from pipeline.evaluation.files import Row, find, letters, table

NOTE = "Note: You only need to respond with {} without providing any additional information.\n\n"


def read(folder: Path, kind: str) -> Iterator[Question]:
    """Yield the 2D or 3D questions of the Parquet files."""
    columns = ("idx", "type", "task", "image", "choices", "answer", "prompt", "source")
    for path in find(folder, f"**/test_{kind.lower()}.parquet", "**/*.parquet"):
        for row in table(path, columns):
            if row.text("type") == kind:
                yield _question(row)


def _question(row: Row) -> Question:
    choices = letters(len(row.strings("choices")))
    answer = row.text("answer").strip().strip("()")
    if answer not in choices:
        raise UserError(f"{row.where}: the answer {answer!r} is none of {', '.join(choices)}")
    text = NOTE.format(", ".join(choices)) + row.text("prompt")
    source = row.text("source")
    facts = {"answer": answer, "category": row.text("task"), "source": source}
    return Question(row.text("idx"), (row.image("image"), text), facts, stratum=source)


@dataclass(frozen=True)
class CvBenchMetric(AnswerMetric):
    """Accuracy, averaged over the sources of the images."""

    sources: tuple[str, ...] = ()
    """Sources that the mean needs."""
    extractor: ClassVar[str] = "the first letter if only spaces and ( come before it"

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError when a source is missing."""
        found = {question.facts["source"] for question in questions}
        if missing := [name for name in self.sources if name not in found]:
            raise UserError(
                f"CV-Bench: no questions of {missing[0]}: the score is the mean of {', '.join(self.sources)}"
            )

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare the leading letter with that of the answer."""
        letter = leading_letter(answer)
        return Grade(letter, float(letter == question.facts["answer"]))

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the mean over sources, the plain accuracy, then both by source and task, in percent."""
        sources = by_fact(graded, "source")
        mean = sum(sources.values()) / max(1, len(sources))
        return {"accuracy": mean, "plain accuracy": percent(graded), **sources, **by_fact(graded, "category")}

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Return the source with credit and count."""
        return one.question.facts["source"], (one.grade.credit, 1.0)

    def headline(self, totals: Mapping[str, Sequence[float]]) -> float:
        """Return the mean over the sources in percent."""
        return sum(100 * credit / count for credit, count in totals.values()) / max(1, len(totals))


def _benchmark(kind: str, sources: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=f"cv-bench-{kind.lower()}",
        title=f"CV-Bench {kind}",
        folder="cv-bench",
        files="test_2d.parquet and test_3d.parquet of nyu-visionx/CV-Bench",
        prompt="'Note: You only need to respond with A, B, ...', an empty line, then the column prompt",
        rule="CV-Bench: 2D is the mean of ADE20K and COCO, 3D is Omni3D; letters as lmms-eval reads them",
        read=partial(read, kind=kind),
        metric=CvBenchMetric(sources),
        max_new_tokens=64,
        column=f"CV-{kind}",
    )


CV_BENCH_2D = _benchmark("2D", ("ADE20K", "COCO"))
CV_BENCH_3D = _benchmark("3D", ("Omni3D",))
