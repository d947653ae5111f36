"""LLaVA-Bench in the wild: 60 open questions; a judge scores each answer beside that of GPT-4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import Benchmark, Grade, Graded, Judge, JudgePrompt, Metric, Question
from pipeline.evaluation.files import Row, as_row, document, find, lines

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
ATTEMPTS, TEMPERATURE, MAX_TOKENS = 3, 0.2, 1024


def read(folder: Path) -> Iterator[Question]:
    """Yield the questions of the official JSON-lines files; ``rule.json`` holds the judge's official prompt."""
    contexts = {row.text("image"): _caption(row) for row in lines(folder / "context.jsonl")}
    references = {row.text("question_id"): row.text("text") for row in lines(folder / "answers_gpt4.jsonl")}
    rules = document(folder / "rule.json")
    for row in lines(find(folder, "questions.jsonl")[0]):
        name, image, category = row.text("question_id"), row.text("image"), row.text("category")
        if image not in contexts or name not in references:
            missing = "context.jsonl" if image not in contexts else "answers_gpt4.jsonl"
            raise UserError(f"{row.where}: {missing} has no line for question {name}")
        rule = as_row(rules.get(f"llava_bench_{category}"), f"{folder / 'rule.json'}: llava_bench_{category}")
        facts = {
            "category": category,
            "context": contexts[image],
            "question": row.text("text"),
            "reference": references[name],
            "role": rule.text("role"),
            "rule": rule.text("prompt"),
        }
        picture = row.image_in(folder / "images", "image")
        yield Question(name, (picture, row.text("text")), facts, stratum=category)


def _caption(row: Row) -> str:
    value = row.values.get("caption")
    return "\n".join(row.strings("caption")) if isinstance(value, list) else row.text("caption")


def judge_text(facts: dict[str, str], answer: str) -> str:
    """Return the judge's prompt: context, question, both answers, rule."""
    role, blocks = facts["role"], [f"[Context]\n{facts['context']}\n\n", f"[Question]\n{facts['question']}\n\n"]
    for number, text in enumerate((facts["reference"], answer), start=1):
        blocks.append(f"[{role} {number}]\n{text}\n\n[End of {role} {number}]\n\n")
    return "".join([*blocks, f"[System]\n{facts['rule']}\n\n"])


def parse_scores(reply: str) -> tuple[float, float] | None:
    """Return the reference's and the model's score from the first line of a reply; None unless it holds two numbers."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")  # "8, 9" makes three words, as officially
    try:
        reference, own = (float(word) for word in words)
    except ValueError:
        return None
    return (reference, own) if 0 <= reference <= 10 and 0 <= own <= 10 else None


class LlavaWMetric(Metric):
    """100 * sum of the model's scores / sum of the reference's scores."""

    extractor = "two numbers in the first line of the judge's reply; asked up to three times, then refused"
    judge_role = "scores each answer and the reference from 1 to 10"

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Ask the judge about every answer. Raises UserError when a reply cannot be read three times."""
        assert judge is not None, "refused before"
        scores: list[tuple[float, float] | None] = [None] * len(questions)
        for attempt in range(ATTEMPTS):
            open_ = [number for number, found in enumerate(scores) if found is None]
            texts = [judge_text(dict(questions[number].facts), answers[number]) for number in open_]
            replies = judge.ask([JudgePrompt(text, SYSTEM, MAX_TOKENS, TEMPERATURE, attempt) for text in texts])
            for number, reply in zip(open_, replies, strict=True):
                scores[number] = parse_scores(reply)
        grades = []
        for question, found in zip(questions, scores, strict=True):
            if found is None:
                raise UserError(f"LLaVA-W question {question.id}: the judge gave no two scores in {ATTEMPTS} replies")
            grades.append(Grade(f"{found[0]:g} {found[1]:g}", found[1] / 10, {"reference": found[0], "own": found[1]}))
        return grades

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the ratio over all questions, then by category (conv, detail, complex)."""
        names = sorted({one.question.facts["category"] for one in graded})
        groups = {name: [one for one in graded if one.question.facts["category"] == name] for name in names}
        return {"all": _ratio(graded), **{name: _ratio(own) for name, own in groups.items()}}

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Return the model's and the reference's score."""
        return "", (one.grade.extra["own"], one.grade.extra["reference"])


def _ratio(graded: Sequence[Graded]) -> float:
    reference = sum(one.grade.extra["reference"] for one in graded)
    return 100 * sum(one.grade.extra["own"] for one in graded) / reference if reference else 0.0


LLAVA_W = Benchmark(
    name="llava-w",
    title="LLaVA-Bench in the wild",
    folder="llava-bench-in-the-wild",
    files="questions.jsonl, context.jsonl, answers_gpt4.jsonl, images/ and LLaVA's llava/eval/table/rule.json",
    prompt="the question as it is",
    rule="LLaVA eval_gpt_review_bench.py and summarize_gpt_review.py; scores of different judges are not comparable",
    read=read,
    metric=LlavaWMetric(),
    max_new_tokens=1024,
    column="LLaVA-W",
)
