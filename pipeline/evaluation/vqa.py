"""Answers of a word or phrase: VQAv2's soft accuracy over ten people, GQA's equality."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Apostrophe, colon and full stop are treated on their own."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    )
}
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'re": "there they what why you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "": "y'all ma'am o'clock 'twas 'ow's'at",
}
_FORMS = [word + ending for ending, words in _ENDINGS.items() for word in words.split()]
_WHOLE_WORDS = ("id've", "were", "hell", "shell", "well", "ill", "wed", "shed", "its")
"""Words that are something else without their apostrophe; the official table leaves them alone.

It has I'm, I've and I'd've in upper case only, so they never match a word in lower case.
"""


def _contractions() -> dict[str, str]:
    """Return spellings that lack one or all apostrophes -> the contraction."""
    table: dict[str, str] = {}
    for form in _FORMS:
        places = [place for place, mark in enumerate(form) if mark == "'"]
        bare = [form[:place] + form[place + 1 :] for place in places]
        if len(places) == 1 or form.endswith("n't"):
            bare.append(form.replace("'", ""))
        table |= {spelling: form for spelling in bare if spelling not in _WHOLE_WORDS}
    return table


_CONTRACTIONS = {**_contractions(), "somebody'd": "somebodyd"}  # an oddity of the official table


def normal_vqa(answer: str) -> str:
    """Normalise an answer: punctuation, then number words, articles and contractions."""
    return _words(_without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def _without_punctuation(text: str) -> str:
    """Drop marks beside a space, and all marks if a number has a comma; other marks become spaces."""
    commas = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        dropped = commas or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if dropped else " ")
    return _STOP.sub("", result)


def _words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return VQAv2's accuracy, 0..1: the mean over people of min(1, matches among the others / 3).

    The references are normalised only where people disagree, as in the official script.
    """
    given = normal_vqa(answer)
    if len(set(references)) > 1:
        references = [normal_vqa(reference) for reference in references]
    matches = [reference == given for reference in references]
    credits = [min(1.0, (sum(matches) - own) / 3) for own in matches]
    return sum(credits) / len(credits) if credits else 0.0


def gqa_answer(answer: str) -> str:
    """Return an answer as GQA's references are written: lower case, no final full stop."""
    return answer.strip().rstrip(".").lower()
