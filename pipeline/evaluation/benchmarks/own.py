"""Your own questions with the metrics of VQAv2, GQA, RefCOCO and COCO captions.

``DATA/NAME/questions.jsonl`` holds one object per line: ``id``, ``images`` (files below ``DATA/NAME/images``),
``question`` and ``references`` (a list of texts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import AnswerMetric, Benchmark, Grade, Graded, Judge, Metric, Question, by_fact
from pipeline.evaluation.boxes import find_box, iou
from pipeline.evaluation.captions import caption_words, cider
from pipeline.evaluation.files import image_file, lines
from pipeline.evaluation.vqa import gqa_answer, soft_accuracy

SHORT = "\nAnswer the question using a single word or phrase."


def read(folder: Path, suffix: str) -> Iterator[Question]:
    """Yield the questions of ``questions.jsonl``."""
    for row in lines(folder / "questions.jsonl"):
        images = [image_file(folder / "images", name, row.where) for name in row.strings("images")]
        references = row.strings("references")
        if not references:
            raise UserError(f"{row.where}: 'references' is empty: give at least one reference answer")
        facts = {"references": references, "category": row.optional("category")}
        yield Question(row.text("id"), (*images, row.text("question") + suffix), facts)


class VqaMetric(AnswerMetric):
    """VQAv2 soft accuracy."""

    extractor = "the answer, normalised as VQAv2 does; an answer that 3 of 10 people gave counts fully"

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare with the answers of the other people, leaving out each in turn."""
        return Grade(answer, soft_accuracy(answer, question.facts["references"]))


class GqaMetric(AnswerMetric):
    """GQA accuracy."""

    extractor = "the answer in lower case without a final full stop"

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare with the references."""
        word = gqa_answer(answer)
        return Grade(word, float(word in question.facts["references"]))


@dataclass(frozen=True)
class BoxMetric(AnswerMetric):
    """Share of boxes whose intersection over union with the reference exceeds 0.5 (RefCOCO)."""

    threshold: float = 0.5
    extractor: ClassVar[str] = "the first four numbers of the answer as x1, y1, x2, y2, in the unit of the reference"

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError when a reference is no box."""
        for question in questions:
            if find_box(question.facts["references"][0]) is None:
                raise UserError(f"question {question.id}: the reference is no box of four numbers x1, y1, x2, y2")

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare the boxes."""
        found, reference = find_box(answer), find_box(question.facts["references"][0])
        overlap = iou(found, reference) if found and reference else 0.0
        return Grade("" if found is None else str(list(found)), float(overlap > self.threshold), {"iou": overlap})


class CiderMetric(Metric):
    """CIDEr-D of captions, over the whole set of references."""

    extractor = "the answer in lower case, split into words; punctuation is dropped"

    def grade(self, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
        """Score each caption; document frequencies come from all references."""
        scores = cider(answers, [question.facts["references"] for question in questions])
        return [Grade(" ".join(caption_words(answer)), one) for answer, one in zip(answers, scores, strict=True)]

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return 100 * the mean CIDEr-D, as the literature prints it."""
        return {
            "cider": 100 * sum(one.grade.credit for one in graded) / max(1, len(graded)),
            **by_fact(graded, "category"),
        }


def _benchmark(name: str, title: str, metric: Metric, suffix: str, rule: str, max_new_tokens: int) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder=name,
        files="questions.jsonl (id, images, question, references) and images/",
        prompt="the question" + (f", then a line: {suffix.strip()}" if suffix else " as it is"),
        rule=rule,
        read=partial(read, suffix=suffix),
        metric=metric,
        max_new_tokens=max_new_tokens,
    )


OWN = (
    _benchmark("vqa", "VQA", VqaMetric(), SHORT, "VQAv2 vqaEval.py: mean over people of min(1, matches / 3)", 16),
    _benchmark("gqa", "GQA", GqaMetric(), SHORT, "GQA eval.py: equality, after LLaVA's convert_gqa_for_eval.py", 16),
    _benchmark("boxes", "Boxes", BoxMetric(), "", "RefCOCO: intersection over union above 0.5", 64),
    _benchmark("captions", "Captions", CiderMetric(), "", "CIDEr-D: n-grams of 1 to 4, sigma 6; own tokenizer", 64),
)
