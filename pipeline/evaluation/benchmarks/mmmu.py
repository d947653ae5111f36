"""MMMU validation: college questions with up to seven images inside the text, multiple choice and open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from data_prep.common.errors import UserError
from data_prep.example import Part
from pipeline.evaluation.benchmark import Benchmark, Grade, Graded, Judge, Metric, Question, by_fact, percent
from pipeline.evaluation.extract import mmmu_matches, mmmu_open, mmmu_option
from pipeline.evaluation.files import Row, find, letters, table

LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
SEED = 42
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_MARK = re.compile(r"(<image [1-7]>)")
_SUBJECT = re.compile(r"^(?:validation|dev|test)_(.+)_\d+$")


def read(folder: Path) -> Iterator[Question]:
    """Yield the validation questions of all subjects, in the order of subject and file."""
    columns = ("id", "question", "options", "answer", "question_type")
    for path in find(folder, "**/validation*.parquet", "**/*.parquet"):
        for row in table(path, columns, IMAGES):
            yield _question(row)


def _question(row: Row) -> Question:
    name, kind = row.text("id"), row.text("question_type")
    found = _SUBJECT.match(name)
    facts: dict[str, object] = {"category": found[1] if found else "", "kind": kind}
    if kind == "multiple-choice":
        texts = row.strings("options")
        options = dict(zip(letters(len(texts)), texts, strict=True))
        if row.text("answer") not in options:
            raise UserError(
                f"{row.where}: the answer {row.text('answer')!r} is none of the options {', '.join(options)}"
            )
        facts |= {"answer": row.text("answer"), "options": options}
        text = f"{row.text('question')}\n" + "".join(f"({a}) {option}\n" for a, option in options.items()) + LETTER
    else:
        answer = row.text("answer")
        facts["answer"] = row.strings("answer") if answer.startswith("[") else [answer]
        text = row.text("question") + SHORT
    parts, marks = _parts(row, text)
    return Question(name, parts, facts, marks, stratum=str(facts["category"]))


def _parts(row: Row, text: str) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Split the text at ``<image N>`` and put the images in; an image without a mark comes first."""
    pieces = [piece for piece in _MARK.split(text) if piece]
    marked = [piece for piece in pieces if _MARK.fullmatch(piece)]
    names = {f"<image {name[-1]}>": name for name in IMAGES if row.has_image(name)}
    unmarked = [mark for mark in names if mark not in marked]
    if missing := [mark for mark in marked if mark not in names]:
        raise UserError(f"{row.where}: the text mentions {missing[0]}, but there is no such image")
    parts = [row.image(names[piece]) if piece in names else piece for piece in (*unmarked, *pieces)]
    return tuple(parts), (*("" for _ in unmarked), *marked)


class MmmuMetric(Metric):
    """Accuracy. An answer without any option gets a random one, from the official seed, in the order of the file."""

    extractor = (
        "multiple choice: (A), then ' A ', then an option's text, the last one wins, none: random (seed 42); "
        "open: an answer that contains the text or equals the number (two decimals)"
    )

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Grade in order: the random choices depend on it."""
        random = Random(SEED)
        return [self._grade(question, answer, random) for question, answer in zip(questions, answers, strict=True)]

    def _grade(self, question: Question, answer: str, random: Random) -> Grade:
        facts = question.facts
        if facts["kind"] == "multiple-choice":
            before = random.getstate()
            letter = mmmu_option(answer, facts["options"], random)
            guessed = float(random.getstate() != before)
            return Grade(letter, float(letter == facts["answer"]), {"guessed": guessed})
        return Grade(str(mmmu_open(answer)), float(mmmu_matches(answer, facts["answer"])), {"guessed": 0.0})

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return accuracy, the share of random choices, and accuracy by subject, in percent."""
        guessed = 100 * sum(one.grade.extra["guessed"] for one in graded) / max(1, len(graded))
        return {"accuracy": percent(graded), "guessed": guessed, **by_fact(graded, "category")}


MMMU = Benchmark(
    name="mmmu",
    title="MMMU val",
    folder="mmmu",
    files="the Parquet files of the validation split, one folder per subject",
    prompt="question, lines '(A) ...', an empty line, "
    + LETTER.strip()
    + " | question, "
    + SHORT.strip()
    + " | <image N> replaced by the image where the template keeps the order, else images first and marks kept",
    rule="MMMU mmmu/utils/eval_utils.py with its LLaVA-1.5 prompt; all images are shown, not only the first",
    read=read,
    metric=MmmuMetric(),
    max_new_tokens=128,
    column="MMMU",
)
