"""MMBench EN dev: four-way questions, each asked once per rotation of its options (CircularEval)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from pipeline.evaluation.benchmark import Benchmark, Grade, Graded, Judge, Metric, Question, by_fact, percent
from pipeline.evaluation.extract import matched_option
from pipeline.evaluation.files import Row, find, table

ROTATION = 1_000_000
"""Rotation k of question i has the index ``i + k * ROTATION``."""
LETTER = "\n\nAnswer with the option's letter from the given choices directly."
OPTIONS = ("A", "B", "C", "D", "E")
_BASE64_AT_LEAST = 64
"""Shorter image cells hold the index of the row with the image."""


def read(folder: Path) -> Iterator[Question]:
    """Yield the rows of the circular TSV or of Parquet."""
    seen: dict[str, ImageRef] = {}
    for path in find(folder, "**/*.parquet", "*.tsv"):
        columns = ("index", "question", "answer", "A", "B", "image")
        for row in table(path, columns, ("hint", "category", "l2-category", "L2-category", "C", "D", "E")):
            yield _question(row, _image(row, seen))


def _image(row: Row, seen: dict[str, ImageRef]) -> ImageRef:
    """Return the row's image; rotations in the TSV hold the index of the row that has it."""
    value = row.values["image"]
    if isinstance(value, str) and len(value) <= _BASE64_AT_LEAST:
        if value not in seen:
            raise UserError(f"{row.where}: its image is that of row index {value}, which does not come before it")
        return seen[value]
    image = row.image("image")
    if isinstance(value, str):
        seen[row.text("index")] = image
    return image


def _question(row: Row, image: ImageRef) -> Question:
    index = int(row.text("index")) if row.text("index").isdecimal() else -1
    if index < 0:
        raise UserError(f"{row.where}: the index {row.text('index')} is not a whole number")
    options = {letter: row.optional(letter) for letter in OPTIONS if row.optional(letter)}
    answer = row.text("answer").strip()
    if answer not in options:
        raise UserError(f"{row.where}: the answer {answer!r} is none of the options {', '.join(options)}")
    hint = f"{row.optional('hint')} " if row.optional("hint") else ""
    listed = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    text = f"{hint}{row.text('question')} There are several options:{listed}{LETTER}"
    category = row.optional("l2-category") or row.optional("L2-category") or row.optional("category")
    facts = {"answer": answer, "options": options, "rotation": index // ROTATION, "category": category}
    return Question(str(index), (image, text), facts, cluster=str(index % ROTATION), stratum=category)


class CircularMetric(Metric):
    """A question counts when the answers to all of its rotations are right."""

    extractor = "the only option letter among the last four words, else the only option text inside a short answer"

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError when no question is rotated, or a rotation lacks its question."""
        groups: dict[str, set[int]] = {}
        for question in questions:
            groups.setdefault(question.group, set()).add(question.facts["rotation"])
        if all(len(rotations) == 1 for rotations in groups.values()):
            raise UserError("MMBench: the file has no rotated questions: CircularEval needs the circular dev file")
        if missing := [group for group, rotations in groups.items() if 0 not in rotations]:
            raise UserError(f"MMBench: the rotations of question {missing[0]} are there, the question is not")

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Grade each row; ``extra["circular"]`` tells whether all rotations of its question are right."""
        read = [
            matched_option(answer, question.facts["options"])
            for question, answer in zip(questions, answers, strict=True)
        ]
        right = [letter == question.facts["answer"] for letter, question in zip(read, questions, strict=True)]
        wrong = {question.group for question, own in zip(questions, right, strict=True) if not own}
        return [
            Grade(letter, float(own), {"circular": float(question.group not in wrong)})
            for letter, own, question in zip(read, right, questions, strict=True)
        ]

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return circular accuracy, plain accuracy without rotations, and circular accuracy by category."""
        main = [one for one in graded if not one.question.facts["rotation"]]
        circular = [Graded(one.question, one.answer, Grade("", one.grade.extra["circular"])) for one in main]
        return {"circular": percent(circular), "vanilla": percent(main), **by_fact(circular, "category")}

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Count the question itself; its rotations add nothing."""
        main = float(not one.question.facts["rotation"])
        return "", (main * one.grade.extra["circular"], main)


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench EN dev",
    folder="mmbench",
    files="MMBench_DEV_EN.tsv, or its Parquet files",
    prompt="hint, question, 'There are several options:', lines 'A. ...', an empty line, " + LETTER.strip(),
    rule="CircularEval with VLMEvalKit's exact matching: all rotations right; no letter or text found is wrong",
    read=read,
    metric=CircularMetric(),
    max_new_tokens=64,
    column="MMB",
    clustered=True,
)
