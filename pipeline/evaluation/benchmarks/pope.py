"""POPE: is there an object in the image? Three splits, F1 of yes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from pipeline.evaluation.benchmark import AnswerMetric, Benchmark, Grade, Graded, Question, percent
from pipeline.evaluation.extract import pope_yes_no
from pipeline.evaluation.files import find, lines, table

SPLITS = ("random", "popular", "adversarial")
SHORT = "\nAnswer the question using a single word or phrase."


def read(folder: Path) -> Iterator[Question]:
    """Yield the questions of ``coco_pope_SPLIT.json`` beside ``val2014/``, or of Parquet files."""
    files = sorted(folder.rglob("*.parquet"))
    for path in files:
        for row in table(path, ("question_id", "question", "answer", "category", "image")):
            where, split = row.where, row.text("category").lower()
            yield _question(
                split, row.text("question_id"), row.text("question"), row.text("answer"), row.image("image"), where
            )
    if not files:
        yield from _official(folder)


def _official(folder: Path) -> Iterator[Question]:
    for split in SPLITS:
        for path in find(folder, f"**/coco_pope_{split}.json"):
            for row in lines(path):
                image = row.image_in(folder / "val2014", "image")
                yield _question(split, row.text("question_id"), row.text("text"), row.text("label"), image, row.where)


def _question(split: str, name: str, text: str, answer: str, image: ImageRef, where: str) -> Question:
    label = answer.strip().lower()
    if label not in ("yes", "no"):
        raise UserError(f"{where}: the answer {answer!r} is not yes or no")
    return Question(f"{split}/{name}", (image, text.strip() + SHORT), {"answer": label, "split": split}, stratum=split)


class PopeMetric(AnswerMetric):
    """F1 of yes, averaged over the splits."""

    extractor = "no if the first sentence has the word No, not or no; anything else is yes"

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError when a split is missing or unknown."""
        found = {question.facts["split"] for question in questions}
        if found != set(SPLITS):
            raise UserError(f"POPE: expected the splits {', '.join(SPLITS)}; found {', '.join(sorted(found))}")

    def grade_one(self, question: Question, answer: str) -> Grade:
        """Compare yes or no with the label."""
        word = pope_yes_no(answer)
        return Grade(word, float(word == question.facts["answer"]))

    def summarize(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Return the mean F1 and accuracy over splits in percent, the share of yes, then F1 and accuracy by split."""
        present = [name for name in SPLITS if any(one.question.facts["split"] == name for one in graded)]
        splits = {name: [one for one in graded if one.question.facts["split"] == name] for name in present}
        f1 = {name: 100 * _f1(own) for name, own in splits.items()}
        accuracy = {name: percent(own) for name, own in splits.items()}
        yes = 100 * sum(one.grade.extracted == "yes" for one in graded) / max(1, len(graded))
        means = {
            "f1": sum(f1.values()) / max(1, len(f1)),
            "accuracy": sum(accuracy.values()) / max(1, len(accuracy)),
            "yes ratio": yes,
        }
        by_split = {
            f"{name} {what}": own[name] for name in present for what, own in (("f1", f1), ("accuracy", accuracy))
        }
        return {**means, **by_split}

    def terms(self, one: Graded) -> tuple[str, tuple[float, ...]]:
        """Return the split with hits, misses and false alarms."""
        pair = one.grade.extracted, one.question.facts["answer"]
        outcomes = (("yes", "yes"), ("no", "yes"), ("yes", "no"))
        return one.question.facts["split"], tuple(float(pair == outcome) for outcome in outcomes)

    def headline(self, totals: Mapping[str, Sequence[float]]) -> float:
        """Return the mean F1 of the splits in percent."""
        return sum(100 * _f1_of(*sums) for sums in totals.values()) / max(1, len(totals))


def _f1(graded: Sequence[Graded]) -> float:
    pairs = [(one.grade.extracted, one.question.facts["answer"]) for one in graded]
    hits, misses, false = (pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("yes", "no")))
    return _f1_of(hits, misses, false)


def _f1_of(hits: float, misses: float, false: float) -> float:
    return 2 * hits / (2 * hits + misses + false) if hits else 0.0


POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    files="coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/, or Parquet files",
    prompt="the question, then a line: " + SHORT.strip(),
    rule="POPE evaluate.py per split; the headline is the mean F1 of the three splits",
    read=read,
    metric=PopeMetric(),
    max_new_tokens=128,
    column="POPE",
)
