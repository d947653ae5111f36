"""Scorer goldens: hand-made predictions with the score that each benchmark's official rule gives.

Every expectation was worked out from the published scorer, oddities included; docs/evaluation.md tables where the
toolkits disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from data_prep.common.errors import UserError
from pipeline.evaluation.benchmark import Grade, JudgePrompt, Metric, Question
from pipeline.evaluation.benchmarks import llava_w, mmvet
from pipeline.evaluation.benchmarks.cvbench import CvBenchMetric
from pipeline.evaluation.benchmarks.llava_w import LlavaWMetric
from pipeline.evaluation.benchmarks.mathvista import MathVistaMetric
from pipeline.evaluation.benchmarks.mmbench import CircularMetric
from pipeline.evaluation.benchmarks.mme import MmeMetric
from pipeline.evaluation.benchmarks.mmmu import MmmuMetric
from pipeline.evaluation.benchmarks.mmvet import MmVetMetric
from pipeline.evaluation.benchmarks.own import BoxMetric, CiderMetric, GqaMetric, VqaMetric
from pipeline.evaluation.benchmarks.pope import PopeMetric
from pipeline.evaluation.benchmarks.realworldqa import RealWorldQaMetric
from pipeline.evaluation.benchmarks.seed import FirstLetterMetric
from pipeline.evaluation.captions import cider

ANIMALS = {"A": "cat", "B": "dog", "C": "bus", "D": "car"}
COLOURS = {"A": "red", "B": "it's blue", "C": "six", "D": "ten"}
YES = {"answer": "yes", "category": "existence", "split": "random"}
NO = {"answer": "no", "category": "existence", "split": "random"}
CHOICE = {"answer": "B", "options": ANIMALS, "rotation": 0, "category": "identity"}
SUBJECT = {"answer": "B", "options": COLOURS, "kind": "multiple-choice", "category": "Art"}
OPEN = {"answer": ["24/7", "3.429"], "kind": "open", "category": "Math"}
PEOPLE = {"references": ["two"] * 7 + ["2"] * 2 + ["three"]}
SPLIT = {"references": ["blue"] * 3 + ["the red"] * 7}
BOX = {"references": ["[0.0, 0.0, 0.2, 0.2]"]}

MME = [
    (YES, "Yes", 1), (YES, "Yes.", 1), (YES, "yes, it is", 1), (YES, "YES", 1), (YES, "(Yes)", 1), (YES, "No", 0),
    (YES, "", 0), (YES, "It is, yes", 0), (YES, "The answer is yes", 0), (YES, "B", 0), (YES, "是的", 0), (YES, "Y", 0),
    (YES, "no, yes", 0), (NO, "Not really", 1), (NO, "no.", 1), (NO, "I see none", 0), (NO, "(B)", 0),
]  # fmt: skip
POPE = [
    (YES, "Yes.", 1), (YES, "yes, it is", 1), (YES, "", 1), (YES, "(B)", 1), (YES, "NO", 1), (YES, "Nope", 1),
    (YES, "否", 1), (YES, ".no", 1), (YES, "Yes. There is no dog", 1), (YES, "No.", 0), (YES, "There is no cat.", 0),
    (YES, "It is not there", 0), (NO, "no, it is", 1), (NO, "No", 1), (NO, "The answer is C", 0), (NO, "No\nYes", 0),
]  # fmt: skip
MMBENCH = [
    (CHOICE, "B", 1), (CHOICE, "B.", 1), (CHOICE, "(B)", 1), (CHOICE, "B. dog", 1), (CHOICE, "The answer is B", 1),
    (CHOICE, "dog", 1), (CHOICE, "Dog.", 1), (CHOICE, "b", 0), (CHOICE, "A or B", 0), (CHOICE, "A dog", 0),
    (CHOICE, "", 0), (CHOICE, "答案是B", 0), (CHOICE, "cat and dog", 0), (CHOICE, "C", 0), (CHOICE, "B. cat", 1),
    (CHOICE, "The correct answer is **B**. Here's why: A cat is smaller", 1), (CHOICE, "Yes.", 0),
    (CHOICE, "B is what I see in this picture", 0), (CHOICE, "Cannot determine the answer B", 0),
]  # fmt: skip
SEED = [
    (CHOICE, "B", 1), (CHOICE, "B.", 1), (CHOICE, "b", 1), (CHOICE, " B", 1), (CHOICE, "B. cat", 1),
    (CHOICE, "Both", 1), (CHOICE, "(B)", 0), (CHOICE, "The answer is B", 0), (CHOICE, "", 0),
    (CHOICE, "A", 0), (CHOICE, "答案是B", 0), (CHOICE, "\uff22", 0), (CHOICE, "Yes.", 0),
]  # fmt: skip
MMMU = [
    (SUBJECT, "B", 1), (SUBJECT, "B.", 1), (SUBJECT, "(B)", 1), (SUBJECT, "The answer is B", 1),
    (SUBJECT, "(A) or (B)", 1), (SUBJECT, "A, then B", 1), (SUBJECT, "B or A", 0), (SUBJECT, "The answer is C", 0),
    (SUBJECT, "I think that it's blue, really so", 1), (SUBJECT, "I am sure that it is six or ten", 0),
    (SUBJECT, "b", 0), (SUBJECT, "", 0), (SUBJECT, "猫", 0), (SUBJECT, "it's blue", 0),  # random: A is the first draw
    (SUBJECT | {"answer": "A"}, "", 1), (SUBJECT | {"answer": "A"}, "B) blue", 1),
    (OPEN, "3.429", 1), (OPEN, "24/7", 1), (OPEN, "The answer is 3.429", 1), (OPEN, "x = 3.43", 1), (OPEN, "3.4", 0),
    (OPEN, "about 3.429 hours", 1), (OPEN, "so it is 24/7", 1), (OPEN, "It is 3.4291.", 1), (OPEN, "答案 3.429", 1),
    (OPEN, "", 0), (OPEN, "B", 0), (OPEN, "Yes.", 0), (OPEN, "3,429", 0), (OPEN, "twenty-four seven", 0),
]  # fmt: skip
LETTER = {"answer": "B", "category": "letter"}
NUMBER = {"answer": "3", "category": "word or number"}
REALWORLDQA = [
    (LETTER, "B", 1), (LETTER, "B.", 1), (LETTER, "(B)", 1), (LETTER, "B. right", 1), (LETTER, "The answer is B", 1),
    (LETTER, "答案是B", 1), (LETTER, "Because", 1), (LETTER, "b", 0), (LETTER, "A or B", 0), (LETTER, "right", 0),
    (LETTER, "", 0), (LETTER, "I choose B because A is wrong", 0), (LETTER, "The answer is C", 0), (NUMBER, "3", 1),
    (NUMBER, "3.", 1), (NUMBER, "three", 0), (NUMBER, "There are 3", 0), (NUMBER, "", 0), (NUMBER, "三", 0),
    ({"answer": "Downhill", "category": "word or number"}, "downhill.", 1),
]  # fmt: skip
CV = [
    (CHOICE, "B", 1), (CHOICE, "(B)", 1), (CHOICE, "B.", 1), (CHOICE, "b", 1), (CHOICE, "(B) 1", 1), (CHOICE, "( B", 1),
    (CHOICE, "B. cat", 1), (CHOICE, "Both", 1), (CHOICE, "The answer is (B)", 0), (CHOICE, "1", 0), (CHOICE, "", 0),
    (CHOICE, "答案是B", 0), (CHOICE, "**B**", 0), (CHOICE, "C", 0), (CHOICE, "Yes.", 0),
]  # fmt: skip
VQA = [
    (PEOPLE, "2", 1), (PEOPLE, "two", 1), (PEOPLE, "Two.", 1), (PEOPLE, "a two", 1), (PEOPLE, "three", 0.3),
    (PEOPLE, "3", 0.3), (PEOPLE, "", 0), (PEOPLE, "(B)", 0), (PEOPLE, "二", 0), (PEOPLE, "The answer is 2", 0),
    (SPLIT, "blue", 0.9), (SPLIT, "the blue!", 0.9), (SPLIT, "RED", 1), (SPLIT, "red and blue", 0),
    ({"references": ["blue"] * 2 + ["red"] * 8}, "blue", 0.6),
    ({"references": ["don't know"] * 9 + ["no"]}, "dont know", 1),
    ({"references": ["1000"] * 9 + ["10"]}, "1,000", 1), ({"references": ["yes"] * 10}, "Yes.", 1),
]  # fmt: skip
RED = {"references": ["red"]}
GQA = [
    (RED, "red", 1), (RED, "Red", 1), (RED, "red.", 1), (RED, " red ", 1), (RED, "dark red", 0), (RED, "", 0),
    (RED, "(B)", 0), (RED, "B. red", 0), (RED, "The answer is red", 0), (RED, "红", 0), (RED, "red, yes", 0),
    (RED, "RED..", 1),
]  # fmt: skip
BOXES = [
    (BOX, "[0.0, 0.0, 0.2, 0.2]", 1), (BOX, "0 0 .2 .2", 1), (BOX, "the box is (0, 0, 0.2, 0.2).", 1),
    (BOX, "[0, 0, 0.2, 0.11]", 1), (BOX, "[0, 0, 0.2, 0.1]", 0), (BOX, "[0.1, 0.1, 0.3, 0.3]", 0),
    (BOX, "[0.5, 0.5, 0.9, 0.9]", 0), (BOX, "", 0), (BOX, "[0, 0, 0.2]", 0), (BOX, "Yes.", 0),
    (BOX, "[0.2, 0.2, 0, 0]", 0), (BOX, "左上", 0), (BOX, "[0, 0, 0.2, 0.2] or [0.8, 0.8, 0.9, 0.9]", 1),
]  # fmt: skip
GOLDENS: Mapping[Metric, Sequence[tuple[Mapping[str, Any], str, float]]] = {
    MmeMetric(): MME,
    PopeMetric(): POPE,
    CircularMetric(): MMBENCH,
    FirstLetterMetric(): SEED,
    MmmuMetric(): MMMU,
    RealWorldQaMetric(): REALWORLDQA,
    CvBenchMetric(): CV,
    VqaMetric(): VQA,
    GqaMetric(): GQA,
    BoxMetric(): BOXES,
}


@pytest.mark.parametrize("metric", GOLDENS, ids=lambda metric: type(metric).__name__)
def test_predictions_get_the_official_score(metric: Metric) -> None:
    goldens = GOLDENS[metric]
    assert len({answer for _, answer, _ in goldens}) >= 12
    found = [(facts, answer, one(metric, facts, answer).credit) for facts, answer, _ in goldens]
    assert found == [(facts, answer, pytest.approx(credit)) for facts, answer, credit in goldens]


def one(metric: Metric, facts: Mapping[str, Any], answer: str) -> Grade:
    return metric.grade([Question("1", ("?",), facts)], [answer], None)[0]


def test_mme_adds_accuracy_and_pairs_by_category() -> None:
    """Two pairs: (right, right) and (right, wrong): accuracy 75, accuracy+ 50; a second category adds 200."""
    asked = [Question(f"{n}", ("?",), (YES, NO)[n % 2], cluster=f"{n // 2}") for n in range(4)]
    asked += [Question(f"c{n}", ("?",), (YES, NO)[n] | {"category": "count"}, cluster="c") for n in range(2)]
    grades = MmeMetric().grade(asked, ["Yes", "No", "Yes", "Yes", "yes.", "no."], None)
    graded = [graded_of(*both) for both in zip(asked, grades, strict=True)]
    assert MmeMetric().summarize(graded) == {"score": 325.0, "existence": 125.0, "count": 200.0}


def graded_of(question: Question, grade: Grade) -> Any:
    from pipeline.evaluation.benchmark import Graded

    return Graded(question, "", grade)


def test_mmbench_counts_a_question_only_if_every_rotation_is_right() -> None:
    asked = [
        Question(f"{n}", ("?",), CHOICE | {"rotation": n % 2, "category": "ab"[n // 2]}, cluster=f"{n // 2}")
        for n in range(4)
    ]
    grades = CircularMetric().grade(asked, ["B", "B", "B", "A"], None)
    graded = [graded_of(*both) for both in zip(asked, grades, strict=True)]
    assert CircularMetric().summarize(graded) == {"circular": 50.0, "vanilla": 100.0, "a": 100.0, "b": 0.0}


def test_pope_averages_f1_over_splits() -> None:
    """Random: one hit, one false alarm: F1 2/3. Popular: nothing said yes: 0. Adversarial: all right: 1."""
    answers = {"random": ("Yes", "Yes"), "popular": ("no", "no"), "adversarial": ("Yes", "No")}
    asked = [Question(f"{s}{n}", ("?",), (YES, NO)[n] | {"split": s}) for s in answers for n in range(2)]
    grades = PopeMetric().grade(asked, [word for both in answers.values() for word in both], None)
    scores = PopeMetric().summarize([graded_of(*both) for both in zip(asked, grades, strict=True)])
    assert scores["f1"] == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    assert scores["accuracy"] == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    assert scores["yes ratio"] == 50.0


def test_cv_bench_2d_averages_the_two_sources() -> None:
    facts = [CHOICE | {"source": source, "category": "Count"} for source in ("ADE20K", "COCO", "COCO", "COCO")]
    asked = [Question(str(n), ("?",), one) for n, one in enumerate(facts)]
    grades = CvBenchMetric().grade(asked, ["B", "B", "A", "A"], None)
    scores = CvBenchMetric().summarize([graded_of(*both) for both in zip(asked, grades, strict=True)])
    assert scores["accuracy"] == pytest.approx((100 + 100 / 3) / 2) and scores["plain accuracy"] == 50.0


def test_mmmu_guesses_in_the_official_order() -> None:
    """random.seed(42) draws A, A, C, B from four letters; a readable answer in between draws nothing."""
    asked = [Question(str(n), ("?",), SUBJECT) for n in range(5)]
    grades = MmmuMetric().grade(asked, ["", "", "D", "", ""], None)
    assert [grade.extracted for grade in grades] == ["A", "A", "D", "C", "B"]
    assert [grade.extra["guessed"] for grade in grades] == [1, 1, 0, 1, 1]


class Replies:
    """A judge that answers from a list and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self._replies = list(replies)
        self.asked: list[JudgePrompt] = []

    def ask(self, prompts: Sequence[JudgePrompt]) -> list[str]:
        self.asked += prompts
        return [self._replies.pop(0) for _ in prompts]


CHOICES = {"kind": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"], "precision": 0, "answer": "8/11"}
WHOLE = {"kind": "free_form", "answer_type": "integer", "choices": [], "precision": 0, "answer": "14"}
DECIMAL = {"kind": "free_form", "answer_type": "float", "choices": [], "precision": 1, "answer": "1.2"}
YEARS = {"kind": "free_form", "answer_type": "list", "choices": [], "precision": 0, "answer": "[2007, 2008]"}


@pytest.mark.parametrize(
    ("facts", "response", "judged", "credit"),
    [
        (CHOICES, "8/11", None, 1), (CHOICES, 'The answer is "8/11".', None, 1), (CHOICES, "(B)", "(B)", 1),
        (CHOICES, "B. cat", "B", 1), (CHOICES, "The answer is C", "C", 0), (CHOICES, "", None, 0),
        (CHOICES, "eight of eleven", "8/1", 1), (CHOICES, "(a)", "(a)", 0), (WHOLE, "14", None, 1),
        (WHOLE, "It is 14.", "14", 1), (WHOLE, "14.0", "14.0", 1), (WHOLE, "14.9", "14.9", 1),
        (WHOLE, "fourteen", "fourteen", 0), (WHOLE, "Yes.", "", 0), (DECIMAL, "1.2", None, 1),
        (DECIMAL, "1.24", None, 1),
        (DECIMAL, "1.26", None, 0), (DECIMAL, "$1.2", "1.2", 1), (DECIMAL, "猫", "", 0), (DECIMAL, "1", None, 0),
        (YEARS, "2007 to 2008", "[2007, 2008]", 1), (YEARS, "2007", "2007", 0),
    ],
)  # fmt: skip
def test_mathvista_extracts_by_rule_then_by_judge(
    facts: dict[str, Any], response: str, judged: str | None, credit: float
) -> None:
    judge = Replies(*([] if judged is None else [judged]))
    asked = Question("1", ("?",), facts | {"query": "How many?", "examples": "Examples.\n"})
    (grade,) = MathVistaMetric().grade([asked], [response], judge)
    assert grade.credit == credit
    texts = [prompt.user for prompt in judge.asked]
    assert texts == ([] if judged is None else [f"Examples.\n\nHow many?\n\n{response}\n\nExtracted answer: "])


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9", (8, 9)), ("8 9\nBecause 1 2", (8, 9)), ("8,9", (8, 9)), ("8.5 7", (8.5, 7)), ("10 1", (10, 1)),
        ("8, 9", None), ("8", None), ("8 9 10", None), ("", None), ("Assistant 1: 8", None), ("Yes.", None),
        ("\n8 9", None), ("八 九", None), ("11 9", None), ("nan 5", None),
    ],
)  # fmt: skip
def test_llava_w_reads_two_scores_from_the_first_line(reply: str, scores: tuple[float, float] | None) -> None:
    assert llava_w.parse_scores(reply) == scores


def wild(category: str) -> Question:
    facts = {"category": category, "context": "A scene.", "question": "What?", "reference": "A cat."}
    return Question(category, ("What?",), facts | {"role": "Assistant", "rule": "Rate."})


def test_llava_w_divides_the_sums_and_asks_again_for_what_it_cannot_read() -> None:
    asked, judge = [wild("conv"), wild("detail")], Replies("8 6", "I like it", "10 3")
    grades = LlavaWMetric().grade(asked, ["one", "two"], judge)
    scores = LlavaWMetric().summarize([graded_of(*both) for both in zip(asked, grades, strict=True)])
    assert scores == {"all": 50.0, "conv": 75.0, "detail": 30.0}
    assert judge.asked[0].user == (
        "[Context]\nA scene.\n\n[Question]\nWhat?\n\n[Assistant 1]\nA cat.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\none\n\n[End of Assistant 2]\n\n[System]\nRate.\n\n"
    )
    with pytest.raises(UserError, match="no two scores in 3 replies"):
        LlavaWMetric().grade(asked[:1], ["one"], Replies("a", "b", "c"))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("0.5", 0.5), ("1.0", 1), ("1", 1), ("0", 0), ("0.5 because", 0.5), (".7", 0.7), ("0.5\n", 0.5), ("", None),
        ("1.5", None), ("-0.1", None), ("score: 0.5", None), ("half", None), ("(B)", None), ("半", None), ("nan", None),
    ],
)  # fmt: skip
def test_mm_vet_reads_a_score_from_0_to_1(reply: str, score: float | None) -> None:
    assert mmvet.parse_score(reply) == score


def test_mm_vet_averages_by_capability_and_gives_0_after_five_replies() -> None:
    facts = {"answer": "-1<AND>-5", "question": "x?", "few_shot": "TABLE", "capabilities": ["math", "ocr"]}
    asked = [Question("1", ("x?",), facts), Question("2", ("x?",), facts | {"capabilities": ["ocr"]})]
    judge = Replies("0.8", *["?"] * 5)
    grades = MmVetMetric().grade(asked, ["-1", "7"], judge)
    scores = MmVetMetric().summarize([graded_of(*both) for both in zip(asked, grades, strict=True)])
    assert scores == {"total": 40.0, "ungraded": 1.0, "math": 80.0, "ocr": 40.0}
    assert judge.asked[0].user == "TABLE\nx? | -1 <AND> -5 | -1 | "
    assert [prompt.temperature for prompt in judge.asked[1:]] == [0, 0, 0.5, 1.0, 1.5]


def test_cider_equals_values_worked_out_by_hand() -> None:
    """Two images with one reference each: every word has idf log 2, so the vectors are the counts."""
    assert cider(["a b", "c x"], [["a b"], ["c d"]]) == pytest.approx([10 * (1 + 1) / 4, 10 * 0.5 / 4])
    longer = cider(["a b b b b b b", "c d"], [["a b"], ["c d"]])[0]
    unigram, bigram = 2 / math.sqrt(37 * 2), 1 / math.sqrt(26)
    assert longer == pytest.approx(10 * (unigram + bigram) / 4 * math.exp(-(5**2) / (2 * 6**2)))
    assert cider(["A b.", "c d"], [["a, B"], ["c d"]])[0] == pytest.approx(5.0)  # case and punctuation do not count
    assert cider(["a", ""], [["a"], ["a b"]]) == [0.0, 0.0]  # a word of every image says nothing


@pytest.mark.parametrize(
    "caption", ["", "Yes.", "(B)", "红色", "x y z", "a b", "B a", "a b c d", "a", "A B!", "b", "c d"]
)
def test_cider_is_between_0_and_10_and_1_at_best_for_each_length(caption: str) -> None:
    asked = [Question("1", ("?",), {"references": ["a b c d"]}), Question("2", ("?",), {"references": ["e f"]})]
    own, other = CiderMetric().grade(asked, [caption, "e f"], None)
    expected = 10.0 if caption == "a b c d" else None
    assert 0 <= own.credit <= 10 and other.credit == pytest.approx(5.0)
    assert (own.credit == pytest.approx(10.0)) == (expected is not None)
