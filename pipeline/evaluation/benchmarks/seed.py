"""SEED-Bench, the image questions (SEED-I): four options, one image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from pipeline.evaluation.benchmark import AnswerMetric, Benchmark, Grade, Question
from pipeline.evaluation.extract import first_character
from pipeline.evaluation.files import Row, as_row, document, table

LETTER = "\nAnswer with the option's letter from the given choices directly."
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FACTS = ("question_id", "question", *CHOICES, "answer", "data_type", "question_type_id")


def read(folder: Path) -> Iterator[Question]:
    """Yield the image questions of SEED-Bench.json beside ``SEED-Bench-image/``, or of Parquet files."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        yield from _official(folder)
    for path in files:
        for row in table(path, (*_FACTS, "image")):
            if row.text("data_type") == "image":
                yield _question(row, _only_image(row), row.text("question_type_id"))


def _official(folder: Path) -> Iterator[Question]:
    path = folder / "SEED-Bench.json"
    content = as_row(document(path), str(path)).values
    listed, kinds = content.get("questions"), content.get("question_type")
    if not isinstance(listed, list) or not isinstance(kinds, dict):
        raise UserError(f"{path}: expected lists under 'questions' and 'question_type'; is this the official file?")
    names = {str(number): name for name, number in kinds.items()}
    for number, value in enumerate(listed, start=1):
        row = as_row(value, f"{path}: question {number}")
        if row.text("data_type") == "image":
            kind = row.text("question_type_id")
            yield _question(row, row.image_in(folder / "SEED-Bench-image", "data_id"), names.get(kind, kind))


def _only_image(row: Row) -> ImageRef:
    images = row.values["image"]
    if isinstance(images, list) and len(images) == 1:
        return Row(row.where, {"image": images[0]}).image("image")
    return row.image("image")


def _question(row: Row, image: ImageRef, category: str) -> Question:
    options = "".join(f"\n{letter}. {row.text(name)}" for letter, name in zip("ABCD", CHOICES, strict=True))
    answer = row.text("answer").strip()
    if answer not in ("A", "B", "C", "D"):
        raise UserError(f"{row.where}: the answer {answer!r} is not A, B, C or D")
    facts = {"answer": answer, "category": category}
    return Question(row.text("question_id"), (image, row.text("question") + options + LETTER), facts, stratum=category)


class FirstLetterMetric(AnswerMetric):
    """Accuracy of the first character."""

    extractor = "the first character, in upper case"

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare the first character with the letter of the answer."""
        letter = first_character(answer)
        return Grade(letter, float(letter == question.facts["answer"]))


SEED_I = Benchmark(
    name="seed-i",
    title="SEED-Bench image",
    folder="seed-bench",
    files="SEED-Bench.json and SEED-Bench-image/, or Parquet files",
    prompt="question, lines 'A. ...' to 'D. ...', then a line: " + LETTER.strip(),
    rule="lmms-eval: first character; the authors rank options by likelihood, LLaVA compares the whole answer",
    read=read,
    metric=FirstLetterMetric(),
    max_new_tokens=16,
    column="SEED-I",
)
