"""MathVista testmini: a judge extracts the answer from the response, rules normalise and compare it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import (
    Benchmark,
    Grade,
    Graded,
    Judge,
    JudgePrompt,
    Metric,
    Question,
    by_fact,
    percent,
)
from pipeline.evaluation.extract import edit_distance
from pipeline.evaluation.files import Row, find, letters, python_string, table

SCRIPT = "ext_ans.py"
KINDS = ("integer", "float", "list", "text")
_QUICK = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")
MAX_TOKENS = 256


def read(folder: Path) -> Iterator[Question]:
    """Yield the rows of the testmini Parquet; the examples for the judge come from the official ``ext_ans.py``."""
    columns = ("pid", "decoded_image", "choices", "precision", "question_type", "answer_type", "answer", "query")
    examples = python_string(folder / SCRIPT, "demo_prompt")
    for path in find(folder, "**/testmini*.parquet"):
        for row in table(path, columns, ("metadata",)):
            yield _question(row, examples)


def _question(row: Row, examples: str) -> Question:
    kind, answer_type = row.text("question_type"), row.text("answer_type")
    choices = row.strings("choices") if row.values["choices"] is not None else []
    if answer_type not in KINDS or (kind == "multi_choice" and not choices):
        raise UserError(
            f"{row.where}: unknown answer_type {answer_type!r}, or a multiple-choice question without choices"
        )
    metadata = row.values.get("metadata")
    facts = {
        "answer": row.text("answer"),
        "choices": choices,
        "kind": kind,
        "answer_type": answer_type,
        "precision": int(float(row.optional("precision") or 0)),
        "query": row.text("query"),
        "category": str(metadata.get("task", "")) if isinstance(metadata, dict) else "",
        "examples": examples,
    }
    return Question(row.text("pid"), (row.image("decoded_image"), row.text("query")), facts)


def extracted_by_rule(facts: dict[str, object], response: str) -> str | None:
    """Return the answer if the response is nothing else, or states ``The answer is "..."``; None needs the judge."""
    choices = facts["choices"]
    if not response or (facts["kind"] == "multi_choice" and isinstance(choices, list) and response in choices):
        return response
    try:
        if facts["answer_type"] == "integer":
            return str(int(response))
        if facts["answer_type"] == "float":
            return str(float(response))
    except ValueError:
        pass
    found = _QUICK.search(response)
    return found[1] if found else None


def judge_text(facts: dict[str, str], response: str) -> str:
    """Return the official extraction prompt: examples, query, response."""
    return f"{facts['examples'].strip()}\n\n{facts['query']}\n\n{response}\n\nExtracted answer: "


def normalized(facts: dict[str, object], extraction: str) -> str | None:
    """Normalise an extraction to the answer's type; None matches nothing.

    A multiple-choice extraction is a letter, or becomes the choice with the smallest edit distance; numbers are
    rounded to the precision of the question.
    """
    choices = facts["choices"]
    if facts["kind"] == "multi_choice" and isinstance(choices, list):
        return _choice(extraction.strip(), choices)
    try:
        if facts["answer_type"] == "integer":
            return str(int(float(extraction)))
        if facts["answer_type"] == "float":
            return str(round(float(extraction), int(str(facts["precision"]))))
    except (ValueError, OverflowError):
        return None
    return extraction if facts["answer_type"] == "list" else None  # the official rule knows no free text


def _choice(extraction: str, choices: list[str]) -> str:
    if found := _LETTER.findall(extraction):
        extraction = found[0].upper()
    named = dict(zip(letters(len(choices)), choices, strict=True))
    return named[extraction] if extraction in named else min(choices, key=lambda one: edit_distance(extraction, one))


class MathVistaMetric(Metric):
    """Accuracy of the normalised extraction."""

    extractor = "the whole response, or 'The answer is \"...\".', else the judge's extraction; then normalised by type"
    judge_role = "extracts the answer from responses that rules cannot read"

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Extract by rule where possible, else by the judge; then normalise and compare."""
        assert judge is not None, "refused before"
        found = [extracted_by_rule(dict(q.facts), answer) for q, answer in zip(questions, answers, strict=True)]
        open_ = [number for number, one in enumerate(found) if one is None]
        texts = [judge_text(dict(questions[number].facts), answers[number]) for number in open_]
        replies = judge.ask([JudgePrompt(text, max_tokens=MAX_TOKENS) for text in texts])
        judged = dict(zip(open_, replies, strict=True))
        return [
            self._grade(q, judged.get(number, one or ""))
            for number, (q, one) in enumerate(zip(questions, found, strict=True))
        ]

    def _grade(self, question: Question, extraction: str) -> Grade:
        value = normalized(dict(question.facts), extraction)
        return Grade(value or "", float(value == question.facts["answer"]))

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return accuracy, then by task, in percent."""
        return {"accuracy": percent(graded), **by_fact(graded, "category")}


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista testmini",
    folder="mathvista",
    files="the testmini Parquet of AI4Math/MathVista and the official evaluation/prompts/ext_ans.py",
    prompt="the column query (hint, question, choices)",
    rule="MathVista extract_answer.py (with quick_extract) and calculate_score.py",
    read=read,
    metric=MathVistaMetric(),
    max_new_tokens=1024,
    column="MathV",
)
