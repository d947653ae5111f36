"""Errors the user can fix. Every command prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN_CHARACTERS = 120


class UserError(ValueError):
    """A file, key or flag from the user is wrong. The message names it and the fix."""


def one_line(problem: object) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(problem).split())


def short_repr(value: object) -> str:
    """Return the ``repr`` of a value as at most one short line, also of huge numbers and deep structures."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # ValueError: an int of more than 4300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the closest known word, or an empty string."""
    guess = closest(word, known)
    return f" (did you mean '{guess}'?)" if guess else ""


def closest(word: str, known: Iterable[str]) -> str:
    """Return the known word closest to ``word``, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")
