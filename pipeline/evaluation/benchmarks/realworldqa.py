"""RealWorldQA: questions with their options and instruction in the text; the answer is a letter, word or number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.evaluation.benchmark import AnswerMetric, Benchmark, Grade, Question
from pipeline.evaluation.extract import ranked_letter
from pipeline.evaluation.files import find, table

LETTERS = ("A", "B", "C", "D")


def read(folder: Path) -> Iterator[Question]:
    """Yield the rows of the Parquet files."""
    number = 0
    for path in find(folder, "**/*.parquet"):
        for row in table(path, ("image", "question", "answer")):
            number += 1
            answer = row.text("answer").strip()
            kind = "letter" if answer.upper() in LETTERS else "word or number"
            facts = {"answer": answer, "category": kind}
            yield Question(f"{number:04d}", (row.image("image"), row.text("question").strip()), facts, stratum=kind)


class RealWorldQaMetric(AnswerMetric):
    """Exact match: letters by an extractor, words and numbers as written."""

    extractor = (
        "letters: the letter in the most telling place; others: the answer in lower case without a final full stop"
    )

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare with the reference answer, without regard to case."""
        reference = question.facts["answer"]
        if question.facts["category"] == "letter":
            letter = ranked_letter(answer, LETTERS)
            return Grade(letter, float(letter == reference.upper()))
        word = answer.lower().strip().rstrip(".")
        return Grade(word, float(word == reference.lower()))


REALWORLDQA = Benchmark(
    name="realworldqa",
    title="RealWorldQA",
    folder="realworldqa",
    files="the Parquet files of xai-org/RealworldQA",
    prompt="the question as it is; it holds the options and the instruction",
    rule="lmms-eval 0.7.2, as xAI publishes no scorer",
    read=read,
    metric=RealWorldQaMetric(),
    max_new_tokens=16,
    column="RealWorldQA",
)
