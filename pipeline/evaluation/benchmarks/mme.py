"""MME: yes/no questions in pairs that share an image. Perception has ten categories, cognition four."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from pipeline.evaluation.benchmark import Benchmark, Grade, Graded, Judge, Metric, Question
from pipeline.evaluation.extract import mme_yes_no
from pipeline.evaluation.files import find, image_file, table

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_NO = " Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


def read(folder: Path, categories: Sequence[str]) -> Iterator[Question]:
    """Yield the questions of some categories, from Parquet, VLMEvalKit's TSV, or the official release folder."""
    files = sorted(folder.rglob("*.parquet")) or sorted(folder.glob("*.tsv"))
    rows = _tables(files) if files else _release(folder)
    for category, name, text, answer, image in rows:
        if category in categories:
            yield _question(category, name, text, answer, image)


def _question(category: str, name: str, text: str, answer: str, image: ImageRef) -> Question:
    text = text.strip().replace(YES_NO, "") + SHORT
    facts = {"answer": answer.strip().lower().rstrip("."), "category": category}
    pair = f"{category}/{name}"
    return Question(f"{pair}: {text.split(chr(10))[0]}", (image, text), facts, cluster=pair, stratum=category)


_RawQuestion = tuple[str, str, str, str, ImageRef]
"""Category, image name, question, answer, image."""


def _tables(files: Sequence[Path]) -> Iterator[_RawQuestion]:
    for path in files:
        name = "question_id" if path.suffix == ".parquet" else "image_path"
        for row in table(path, ("category", name, "question", "answer", "image")):
            words = [row.text(key) for key in ("category", name, "question", "answer")]
            yield words[0], words[1], words[2], words[3], row.image("image")


def _release(folder: Path) -> Iterator[_RawQuestion]:
    """Read ``CATEGORY/NAME.txt`` with lines ``question<TAB>answer``; images lie beside it or in ``images/``."""
    for path in find(folder, "**/*.txt"):
        nested = path.parent.name == "questions_answers_YN"
        category = path.parents[1] if nested else path.parent
        if category.name not in (*PERCEPTION, *COGNITION):  # the release also holds a folder of answers to be scored
            continue
        images = category / "images" if nested else category
        name = next((path.stem + end for end in IMAGE_SUFFIXES if (images / (path.stem + end)).is_file()), None)
        image = image_file(images, name or path.stem + IMAGE_SUFFIXES[0], str(path))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text, tab, answer = line.rpartition("\t")
            if not tab:
                raise UserError(f"{path}: line {number} is not question<TAB>answer; download it again")
            yield category.name, image.name, text, answer, image


@dataclass(frozen=True)
class MmeMetric(Metric):
    """Sum over categories of accuracy and accuracy+ in percent; accuracy+ counts images with both answers right."""

    categories: tuple[str, ...] = ()
    """Categories that the sum needs."""
    extractor: ClassVar[str] = "yes or no in the first four characters, lower case; anything else is wrong"

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError unless all categories are there and every image has two questions, answered yes or no."""
        for question in questions:
            if question.facts["answer"] not in ("yes", "no"):
                raise UserError(f"MME {question.id}: the answer is {question.facts['answer']!r}, not yes or no")
        for pair, members in _pairs(questions).items():
            if len(members) != 2:
                raise UserError(f"MME image {pair} has {len(members)} questions, not 2: the files are incomplete")
        found = {question.facts["category"] for question in questions}
        if missing := [name for name in self.categories if name not in found]:
            raise UserError(f"MME: no questions of the category {missing[0]}: the score is a sum over all categories")

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Grade each answer; ``extra["pair"]`` tells whether both answers about the image are right."""
        read = [mme_yes_no(answer) for answer in answers]
        right = [word == question.facts["answer"] for word, question in zip(read, questions, strict=True)]
        pairs = _pairs(questions)
        both = [all(right[member] for member in pairs[question.group]) for question in questions]
        return [
            Grade(word, float(own), {"pair": float(pair)}) for word, own, pair in zip(read, right, both, strict=True)
        ]

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the total, then each category's score (at most 200)."""
        categories: dict[str, list[Grade]] = {}
        for one in graded:
            categories.setdefault(one.question.facts["category"], []).append(one.grade)
        scores = {
            name: 100 * sum(grade.credit + grade.extra["pair"] for grade in grades) / len(grades)
            for name, grades in categories.items()
        }
        return {"score": sum(scores.values()), **scores}

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Return the category with credit and pair together, and the count."""
        return one.question.facts["category"], (one.grade.credit + one.grade.extra["pair"], 1.0)

    def headline(self, totals: Mapping[str, Sequence[float]]) -> float:
        """Return the sum of the categories' scores."""
        return sum(100 * credit / count for credit, count in totals.values())


def _pairs(questions: Sequence[Question]) -> dict[str, list[int]]:
    pairs: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        pairs.setdefault(question.group, []).append(number)
    return pairs


def _benchmark(name: str, title: str, categories: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder="mme",
        files="MME as Parquet, as TSV, or the release folder with one sub-folder per category",
        prompt="the question without 'Please answer yes or no.', then a line: " + SHORT.strip(),
        rule="MME eval_tool/calculation.py: per category 100 * accuracy + 100 * accuracy+, summed",
        read=partial(read, categories=categories),
        metric=MmeMetric(categories),
        max_new_tokens=16,
        column=title,
        clustered=True,
    )


MME_P = _benchmark("mme-p", "MME-P", PERCEPTION)
MME_C = _benchmark("mme-c", "MME-C", COGNITION)
