"""Rules that read an option or a yes/no from free text. Each follows one published scorer, oddities included.

docs/evaluation.md tables where these rules disagree and which benchmark uses which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeAlias

Finder: TypeAlias = Callable[[str, str], int]
"""Position of a letter in a text, or -1."""


def mme_yes_no(answer: str) -> str:
    """Return yes, no or other: the whole answer, else its first four characters (MME's ``eval_tool``)."""
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def pope_yes_no(answer: str) -> str:
    """Return yes or no: no if the first sentence has the word No, not or no, else yes (POPE's ``evaluate.py``).

    An empty or foreign answer therefore counts as yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def matched_option(answer: str, options: Mapping[str, str]) -> str:
    """Return the option an answer names by letter, else by text; empty if undecided (VLMEvalKit's exact matching).

    A letter counts when it is the only option letter that stands as a word, among the last four words. A text counts
    when it is the only option text inside an answer of at most twice the length of all options.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return ""
    return _letter_as_word(answer, options) or _text_inside(answer, options)


def _letter_as_word(answer: str, options: Mapping[str, str]) -> str:
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"  # the letter for "none of these" in VLMEvalKit's judge prompt
    found = _ANSWER_IS.search(answer)
    return found[1].upper() if found and found[1].upper() in options else ""


def _text_inside(answer: str, options: Mapping[str, str]) -> str:
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    inside = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else ""


def leading_letter(answer: str) -> str:
    """Return the first letter, in upper case, if only spaces and ``(`` precede it (lmms-eval's CV-Bench)."""
    found = re.match(r"[(\s]*([a-z])", answer.strip(), re.IGNORECASE | re.ASCII)
    return found[1].upper() if found else ""


def first_character(answer: str) -> str:
    """Return the first character in upper case (lmms-eval's SEED-Bench)."""
    return answer.strip()[:1].upper()


_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def ranked_letter(answer: str, choices: Sequence[str]) -> str:
    """Return the option letter in the most telling place; empty if there is none (lmms-eval's ``extract_mcq_answer``).

    Places in order: the start, the end, after a phrase such as "the answer is", ``(A)``, ``A.``, ``A:``, ``A)``,
    ``A`` before a space, anywhere. Within one kind of place the last occurrence wins.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text, bare = f" {text} ", text.strip()
    places: list[Finder] = [
        lambda _, letter: 0 if bare.startswith(letter) and not bare[1:2].isalpha() else -1,
        lambda _, letter: len(text) if bare.endswith(letter) and not bare[-2:-1].isalpha() else -1,
        _after_phrase,
        *(_written(form) for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}")),
    ]
    for place in places:
        found = {letter: place(text, letter) for letter in choices}
        best = max(found, key=lambda letter: (found[letter], -choices.index(letter)), default="")
        if best and found[best] >= 0:
            return best
    return ""


def _written(form: str) -> Finder:
    return lambda text, letter: text.rfind(form.format(letter))


def _after_phrase(text: str, letter: str) -> int:
    lower = text.lower()
    starts = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
    return max((text.find(letter, start) for start in starts), default=-1)


def mmmu_option(answer: str, options: Mapping[str, str], random: Random) -> str:
    """Return the option letter an answer names, at random when it names none (MMMU's ``eval_utils.py``).

    ``(A)`` comes before `` A ``, and both before an option's text inside an answer of more than five words; the last
    occurrence wins.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    padded = f" {answer} "
    for form in ("({})", " {} "):
        found = {letter: padded.rfind(form.format(letter)) for letter in options}
        if max(found.values(), default=-1) >= 0:
            return max(found, key=lambda letter: found[letter])
    if len(padded.split()) > 5:
        found = {letter: padded.lower().rfind(text.lower()) for letter, text in options.items()}
        if max(found.values(), default=-1) >= 0:
            return max(found, key=lambda letter: found[letter])
    return random.choice(list(options))


Value: TypeAlias = str | float
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu_values(text: str) -> list[Value]:
    """Normalise one open answer: a number rounded to two decimals, else lower-case text (MMMU's ``normalize_str``)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_open(answer: str) -> list[Value]:
    """Return the values an open answer may state: the tails after "is", "answer", ... and their numbers.

    Follows MMMU's ``parse_open_response``.
    """
    response = answer.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", response)
    tails: list[str] = []
    for number, sentence in enumerate(sentences):
        indicators = (*_INDICATORS, "=") if number == len(sentences) - 1 else _INDICATORS
        found = [sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence]
        shortest = _shortest(found)
        if shortest and shortest not in tuple(":,.!?;'"):
            tails.append(shortest)
    stated = tails or [response]
    stated += [number for tail in list(stated) for pattern in _NUMBERS for number in pattern.findall(tail)]
    return list(dict.fromkeys(value for text in stated for value in mmmu_values(text)))


def _shortest(tails: Sequence[str]) -> str:
    """Return the first shortest tail; a later one replaces an empty one (the official loop tests for emptiness)."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def mmmu_matches(answer: str, references: Sequence[str]) -> bool:
    """Return whether an open answer contains a reference text or equals a reference number."""
    wanted = [value for reference in references for value in mmmu_values(reference)]
    return any(
        any(isinstance(want, str) and want in value for want in wanted) if isinstance(value, str) else value in wanted
        for value in mmmu_open(answer)
    )


def edit_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(previous[column] + 1, current[column - 1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]
