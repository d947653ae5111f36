"""Held-out accuracy on the page: per family with intervals, and answers beside their pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from data_prep.show.inspect import PackFolder
from data_prep.show.web_page import Html, el, picture, table
from pipeline.report.history import History, Score

EXAMPLES = 6
"""Right answers shown, and as many wrong ones."""
_Z95 = 1.959964


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927), each end in 0..1."""
    share, weight = right / asked, _Z95**2 / asked
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 / (1 + weight) * math.sqrt(share * (1 - share) / asked + weight / (4 * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(runs: Sequence[History]) -> Iterator[Html]:
    """Yield the table of held-out accuracy, one column per run."""
    found = {run.name: run.evaluation for run in runs if run.evaluation is not None}
    if not found:
        yield el("p", "No held-out accuracy yet: mma evaluate --model RUN --packs DIR measures it.", class_="quiet")
        return
    yield el("h2", "Held-out accuracy")
    families = dict.fromkeys(family for evaluation in found.values() for family in evaluation.scores)
    rows = []
    for family in families:
        scores = {name: evaluation.scores.get(family) for name, evaluation in found.items()}
        known = next(score for score in scores.values() if score is not None)
        cells = [_with_interval(score) for score in scores.values()]
        rows.append([family, f"{known.asked:,}", f"{known.guess / known.asked:.1%}", *cells])
    yield table(["family", "questions", "best guess", *found], rows)
    yield el(
        "p",
        "Best guess: the most frequent answer of each family, chosen on these questions. In brackets: 95 % interval "
        "over questions (Wilson). It says nothing about other seeds of training.",
        class_="quiet",
    )


def _with_interval(score: Score | None) -> str:
    if score is None:
        return "not asked"
    low, high = wilson(score.right, score.asked)
    return f"{score.right / score.asked:.1%} [{low:.1%}, {high:.1%}]"


def answers(run: History, folder: PackFolder | None) -> Iterator[Html]:
    """Yield right and wrong answers of a run, with their questions and pictures if ``folder`` holds them."""
    if run.evaluation is None:
        return
    pictures = {} if folder is None else _pictures(folder, {str(answer["sample"]) for answer in _chosen(run)})
    yield el("h2", f"Answers of {run.name}")
    cards = []
    for answer in _chosen(run):
        verdict = "right" if answer["right"] else "wrong"
        lines = [f"{answer['family']}: {answer['sample']}", f"answer: {answer['answer']}"]
        if verdict == "wrong":
            lines.append(f"truth: {answer['reference']}")
        question, image = pictures.get(str(answer["sample"]), ("", Html()))
        head = el("span", verdict, class_=f"code {verdict}"), el("p", question)
        cards.append(el("div", image, el("div", *head, *(el("div", line) for line in lines)), class_="example"))
    yield el("div", *cards, class_="examples")


def _chosen(run: History) -> list[Mapping[str, object]]:
    """Return the first right answers and the first wrong ones, of all families in turn."""
    assert run.evaluation is not None
    chosen: list[Mapping[str, object]] = []
    for wanted in (True, False):
        own = [answer for answer in run.evaluation.answers if answer["right"] is wanted]
        step = max(1, len(own) // EXAMPLES)
        chosen += own[::step][:EXAMPLES]
    return chosen


def _pictures(folder: PackFolder, samples: set[str]) -> dict[str, tuple[str, Html]]:
    """Return the prompt and the first picture of each of these samples."""
    found: dict[str, tuple[str, Html]] = {}
    for row in folder.reader:
        for segment, source in enumerate(row.source, start=1):
            if source.sample in samples and source.sample not in found:
                spans = list(folder.token_spans(row, segment))
                text = " ".join(
                    span.text for span in spans if span.instance < 0 and not span.generated and not span.special
                )
                images = [span.instance for span in spans if span.instance >= 0]
                found[source.sample] = text, picture(folder.image(row, images[0])) if images else Html()
    return found
