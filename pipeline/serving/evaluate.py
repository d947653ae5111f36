"""Accuracy of exported models on a held-out pack folder, by question family, beside the best constant guess.

Each segment is asked as it was packed: its tokens before the last generated run are the prompt, and that run is the
reference answer. Nothing is re-tokenised, so a model is asked exactly as it was trained.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomic
from data_prep.images.store import ImageStore
from data_prep.packs import PackReader, PackRow, last_answer
from data_prep.text.encoding import Encoded
from data_prep.text.tokenizer import Tokenizer
from pipeline.serving.flow import AdaptiveFlow
from pipeline.serving.model import MultimodalModel, decode_image
from pipeline.serving.prompt import Prompt

SPARE_TOKENS = 8
"""Number of tokens by which an answer may exceed the longest reference."""


@dataclass(frozen=True)
class Question:
    """One segment of a packed row: a prompt and its reference answer."""

    sample: str
    family: str
    prompt: Encoded
    image_rows: tuple[int, ...]
    """Rows of the image store, in reading order."""
    reference_ids: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Correct answers in one family."""

    asked: int
    right: int
    guess: int
    """Correct answers of the best constant answer for this family, chosen on these same questions."""

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers, 0..1."""
        return self.right / self.asked

    @property
    def chance(self) -> float:
        """Fraction that the best constant answer gets right, 0..1."""
        return self.guess / self.asked


@dataclass(frozen=True)
class Answer:
    """The outcome of one question."""

    sample: str
    family: str
    reference: str
    answer: str
    right: bool


def questions(packs: PackReader, rows: range | None = None) -> Iterator[Question]:
    """Yield the questions of these rows (default: all) in order; segments without prompt or answer are skipped."""
    for row in map(packs.__getitem__, range(len(packs)) if rows is None else rows):
        for number, source in enumerate(row.source, start=1):
            found = _question(row, number)
            if found is not None:
                prompt, images, reference = found
                yield Question(source.sample, source.family or source.dataset, prompt, images, reference)


def _question(row: PackRow, number: int) -> tuple[Encoded, tuple[int, ...], tuple[int, ...]] | None:
    answer = last_answer(row, number)
    if answer is None:
        return None
    prompt = np.flatnonzero((row.segment == number) & (np.arange(len(row.segment)) < answer.start))
    instance = row.instance[prompt]
    media = np.unique(instance[instance >= 0])
    local = np.where(instance >= 0, np.searchsorted(media, instance), -1).astype(np.int16)
    encoded = Encoded(row.input_ids[prompt], row.modality[prompt], local, row.generated[prompt])
    reference = row.input_ids[answer.start : answer.stop]
    return encoded, tuple(int(row.image_row[index]) for index in media), tuple(reference.tolist())


def normal(text: str) -> str:
    """Normalise an answer for comparison: lower case, single spaces, no final full stop."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def evaluate(
    model: MultimodalModel,
    packs: PackReader,
    *,
    skip: int = 0,
    limit: int | None = None,
    batch: int = 16,
    flow: AdaptiveFlow | None = None,
) -> list[Answer]:
    """Ask a model every question of a pack folder, greedily, in batches of similar length.

    Args:
        model: an exported model.
        packs: a held-out folder, built with the model's tokenizer.
        skip: leave out the first ``skip`` questions.
        limit: ask only ``limit`` questions.
        batch: questions per batch.
        flow: cut what text reads of the images; None: read everything.

    Returns:
        One answer per question, in the order of the packs.

    Raises:
        UserError: the packs were built with a different tokenizer or ``image_tokens``, or hold no question.
    """
    check_same(model, packs)
    asked = list(islice(questions(packs), skip, None if limit is None else skip + limit))
    if not asked:
        raise UserError(f"{packs.directory} holds no question with an answer: give a held-out pack folder")
    store = packs.manifest.image_store
    images = ImageStore(packs.directory / store) if store else None
    longest = max(len(question.reference_ids) for question in asked) + SPARE_TOKENS
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].prompt))
    answers: dict[int, Answer] = {}
    for start in track(range(0, len(order), batch), "asking", console=Console(stderr=True), transient=True):
        chosen = order[start : start + batch]
        prompts = [prompt_of(asked[index], images) for index in chosen]
        for index, text in zip(chosen, model.generate(prompts, max_new_tokens=longest, flow=flow), strict=True):
            answers[index] = _judge(asked[index], text, model)
    return [answers[index] for index in range(len(asked))]


def check_same(model: MultimodalModel, packs: PackReader) -> None:
    """Raise UserError when packs were built with another tokenizer, or other image tokens, than the model has."""
    manifest = packs.manifest
    if manifest.media != model.spec.media:
        theirs, own = manifest.media_spec.image, model.spec.media_spec.image
        raise UserError(
            f"{packs.directory} has {theirs.describe()}, the model {own.describe()}: rebuild the packs with the model's"
        )
    if manifest.image_tokens != model.spec.image_tokens:
        raise UserError(
            f"{packs.directory} has {manifest.image_tokens} tokens per image, the model {model.spec.image_tokens}: "
            "rebuild the packs with the model's image_tokens"
        )
    if Tokenizer.load(packs.directory / manifest.tokenizer).sha256 != model.tokenizer.sha256:
        raise UserError(
            f"{packs.directory} was built with a different tokenizer: rebuild the packs with the model's tokenizer"
        )


def prompt_of(question: Question, images: ImageStore | None) -> Prompt:
    """Return a question with its pictures. Raises UserError when it has some and there is no image store."""
    if question.image_rows and images is None:
        raise UserError(f"sample {question.sample} has images, but the packs name no image store: rebuild the packs")
    rows = [(row, images.read(row)) for row in question.image_rows] if images is not None else []
    return Prompt(question.prompt, tuple(decode_image(f"{row} of the image store", data) for row, data in rows))


def _judge(question: Question, text: str, model: MultimodalModel) -> Answer:
    reference = model.answer_text(question.reference_ids)
    right = normal(text) == normal(reference)
    return Answer(question.sample, question.family, reference, text, right)


def scores(answers: Sequence[Answer]) -> dict[str, Score]:
    """Count correct answers by family, in order of name, then in ``all``, whose guess adds the guesses per family."""
    table: dict[str, Score] = {}
    for family in sorted({answer.family for answer in answers}):
        own = [answer for answer in answers if answer.family == family]
        best = Counter(normal(answer.reference) for answer in own).most_common(1)[0][1]
        table[family] = Score(len(own), sum(answer.right for answer in own), best)
    sums = [sum(getattr(score, name) for score in table.values()) for name in ("asked", "right", "guess")]
    return {**table, "all": Score(*sums)}


def show(results: dict[str, list[Answer]], console: Console) -> None:
    """Print the accuracy per family, one column per model, beside the best constant guess."""
    tables = {name: scores(answers) for name, answers in results.items()}
    first = next(iter(tables.values()))
    table = Table(title="exact-match accuracy", title_justify="left")
    table.add_column("family")
    for name in ("questions", "best guess", *tables):
        table.add_column(name, justify="right", overflow="fold")
    last_family = list(first)[-2]
    for family, score in first.items():
        own = [f"{100 * table_[family].accuracy:.1f} %" for table_ in tables.values()]
        table.add_row(family, str(score.asked), f"{100 * score.chance:.1f} %", *own, end_section=family == last_family)
    console.print(table)
    console.print("best guess: the most frequent answer of each family, chosen on these same questions")
    if len(tables) > 1:
        console.print("one run per model on these questions: this compares two runs, not two methods")


def save(results: dict[str, list[Answer]], path: Path) -> None:
    """Write the scores and every answer as JSON. Raises OSError when the file cannot be written."""
    content = {
        name: {
            "scores": {
                family: {**asdict(score), "accuracy": score.accuracy, "chance": score.chance}
                for family, score in scores(answers).items()
            },
            "answers": [asdict(answer) for answer in answers],
        }
        for name, answers in results.items()
    }
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
