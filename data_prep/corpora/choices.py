"""Multiple-choice questions: lettered options, shuffled together with the answer."""

from __future__ import annotations

import random
from string import ascii_uppercase
from typing import NamedTuple

from data_prep.corpora.base import Row
from data_prep.corpora.fields import clean_text, require
from data_prep.quarantine import BadSample

LETTER_ANSWER = "Answer with the option's letter from the given choices directly. {question}"


class Options(NamedTuple):
    """Options in display order, and the letter of the correct one."""

    texts: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.texts, strict=False))


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
