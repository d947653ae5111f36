"""MM-Vet: 218 open questions, graded 0..1 by a judge with the official few-shot prompt, by capability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.evaluation.benchmark import Benchmark, Grade, Graded, Judge, JudgePrompt, Metric, Question, percent
from pipeline.evaluation.files import as_row, document, python_string

ATTEMPTS, MAX_TOKENS = 5, 3
REPEATED = "\nPredict the correctness of the answer (digit): "
SCRIPT = "mm-vet_evaluator.py"


def read(folder: Path) -> Iterator[Question]:
    """Yield the questions of ``mm-vet.json`` beside ``images/``; the judge's prompt comes from the official script."""
    path = folder / "mm-vet.json"
    few_shot = python_string(folder / SCRIPT, "prompt")
    for name, value in document(path).items():
        row = as_row(value, f"{path}: {name}")
        facts = {
            "answer": row.text("answer"),
            "question": row.text("question"),
            "capabilities": sorted(set(row.strings("capability"))),
            "few_shot": few_shot,
        }
        image = row.image_in(folder / "images", "imagename")
        yield Question(name, (image, row.text("question")), facts)


def judge_text(facts: dict[str, str], answer: str) -> str:
    """Return the judge's prompt: the official few-shot table and one more row to complete."""
    truth = facts["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return facts["few_shot"] + "\n" + " | ".join([facts["question"], truth, answer, ""])


def parse_score(reply: str) -> float | None:
    """Return the score at the beginning of a reply; None unless it is a number from 0 to 1."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


class MmVetMetric(Metric):
    """Mean score in percent."""

    extractor = (
        "the number from 0 to 1 at the start of the judge's reply; after five unreadable replies 0, as officially"
    )
    judge_role = "grades each answer from 0 to 1"

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Ask the judge about every answer; unreadable replies are asked again at a higher temperature."""
        assert judge is not None, "refused before"
        texts = [judge_text(dict(question.facts), answer) for question, answer in zip(questions, answers, strict=True)]
        scores: list[float | None] = [None] * len(texts)
        for attempt in range(ATTEMPTS):
            open_ = [number for number, found in enumerate(scores) if found is None]
            warmer = 0.5 * max(0, attempt - 1)  # the official script raises it after the first repeated request
            prompts = [
                JudgePrompt(texts[number] + (REPEATED if attempt else ""), "", MAX_TOKENS, warmer, attempt)
                for number in open_
            ]
            for number, reply in zip(open_, judge.ask(prompts), strict=True):
                scores[number] = parse_score(reply)
        return [Grade("" if found is None else f"{found:g}", found or 0.0) for found in scores]

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the total, the number of answers the judge could not grade, then the mean by capability."""
        names = sorted({name for one in graded for name in one.question.facts["capabilities"]})
        groups = {name: [one for one in graded if name in one.question.facts["capabilities"]] for name in names}
        ungraded = float(sum(not one.grade.extracted for one in graded))
        return {"total": percent(graded), "ungraded": ungraded, **{name: percent(own) for name, own in groups.items()}}


MM_VET = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    folder="mm-vet",
    files="mm-vet.json, images/ and the official mm-vet_evaluator.py, which holds the judge's prompt",
    prompt="the question as it is",
    rule="MM-Vet mm-vet_evaluator.py, one run; scores of different judges are not comparable",
    read=read,
    metric=MmVetMetric(),
    max_new_tokens=1024,
    column="MM-Vet",
)
