"""Multiple-choice questions: lettered options, shuffled together with the answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from string import ascii_uppercase
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from data_prep.corpora.base import Row, RowCorpus
from data_prep.corpora.fields import clean_text, require
from data_prep.quarantine import BadSample

LETTER_ANSWER = "Answer with the option's letter from the given choices directly. "
PARITY_ORDERS = 16
"""Orders of the options per question with ``aki_parity``. AKI's mixture draws A-OKVQA 9.7 times and ScienceQA 12.9."""


class Options(NamedTuple):
    """Options in display order, and the letter of the correct one."""

    texts: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.texts, strict=False))


class ChoiceCorpus(RowCorpus):
    """Options shared by the corpora of multiple-choice questions."""

    shuffle: bool = True
    """Shuffle the options, seeded by the question's id; the answer letter follows its option. False: the order of the
    file."""
    orders: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Independent random orders of the options per question; each is a sample of its own. Default: 1, or 16 with
    ``aki_parity``. More than 1 needs ``draws`` in the pack set: with ``epochs``, every order would be drawn."""
    aki_parity: bool = False
    """Ask as the released AKI does: its prompt, and options shuffled again for every draw. Samples are prepared before
    training, so a draw cannot shuffle; instead each question is prepared in ``orders`` independent random orders, and
    each is drawn at most once while a question is drawn at most ``orders`` times on average. Set by ``aki_parity`` of
    the pack set."""

    @model_validator(mode="after")
    def _orders_are_shuffled(self) -> ChoiceCorpus:
        if not self.shuffle and (self.orders or 1) > 1:
            raise ValueError("orders: shuffle=false keeps the order of the file: remove one of the two")
        return self

    def variants(self, options: Options, sample: str) -> Iterator[tuple[str, Options]]:
        """Yield the id and the options of each sample that a question becomes."""
        if not self.shuffle:
            yield sample, options
            return
        yield sample, shuffle_options(options, sample)
        for number in range(1, self.orders or (PARITY_ORDERS if self.aki_parity else 1)):
            name = f"{sample}/order-{number}"
            yield name, shuffle_options(options, name)


def read_options(row: Row, key: str, answer_key: str) -> Options:
    """Return the options under ``key``; ``row[answer_key]`` is the index of the correct one.

    Raises:
        BadSample: missing-key, empty-text, bad-encoding; no-answer when the row gives no index; bad-label when the
            index is out of range or there are fewer than two options.
    """
    texts = tuple(clean_text(str(option), key) for option in require(row, key, list))
    if row.get(answer_key) is None:
        raise BadSample("no-answer", f"'{answer_key}' is missing; is this a test split?")
    number = require(row, answer_key, int)
    if not 2 <= len(texts) <= len(ascii_uppercase) or not 0 <= number < len(texts):
        raise BadSample("bad-label", f"'{answer_key}' is {number}, but there are {len(texts)} options")
    if not all(texts):
        raise BadSample("empty-text", f"an option in '{key}' is empty")
    return Options(texts, ascii_uppercase[number])


def shuffle_options(options: Options, key: str) -> Options:
    """Return the options in an order that depends only on ``key``; the letter follows the correct option."""
    order = list(range(len(options.texts)))
    random.Random(key).shuffle(order)
    right = order.index(ascii_uppercase.index(options.answer))
    return Options(tuple(options.texts[number] for number in order), ascii_uppercase[right])
