"""What pydantic found wrong, as lines a user can act on: the key, the problem, the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import closest, did_you_mean

Place = Sequence[int | str]
"""Where a value stands in nested settings."""


def problems(error: ValidationError, known: Callable[[Place], Iterable[str]] = lambda place: ()) -> list[str]:
    """Return every problem as ``a.b.c: what is wrong and how to fix it``, misspelt keys first.

    Args:
        error: of one validation.
        known: returns the keys that may stand at the place of a misspelt one, for "did you mean".
    """
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    meant = set(_meant(found, known))
    return [_line(problem, known) for problem in found if (problem["type"], tuple(problem["loc"])) not in meant]


def first_problem(error: ValidationError, known: Callable[[Place], Iterable[str]] = lambda place: ()) -> str:
    """Return the first of `problems`."""
    return problems(error, known)[0]


def report(origin: str, lines: Sequence[str]) -> str:
    """Return one line for one problem, a list for several."""
    if len(lines) == 1:
        return f"{origin}: {lines[0]}"
    return "\n".join([f"{origin}: {len(lines)} problems", *(f"  - {line}" for line in lines)])


def dotted(place: Place) -> str:
    """Return a place as ``packs.sft.seq_len``."""
    return ".".join(map(str, place))


def _meant(found: Sequence[Any], known: Callable[[Place], Iterable[str]]) -> Iterator[tuple[str, Place]]:
    """Yield the missing keys that a misspelt one stands for: one problem, not two."""
    for problem in found:
        if problem["type"] == "extra_forbidden":
            *parent, name = problem["loc"]
            guess = closest(str(name), known(problem["loc"]))
            if guess:
                yield "missing", (*parent, guess)


def _line(problem: Any, known: Callable[[Place], Iterable[str]]) -> str:
    place, kind = problem["loc"], problem["type"]
    key = dotted(place)
    if kind == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(str(place[-1]), known(place))}"
    if kind == "missing":
        return f"{key} is missing: add it"
    if kind in ("model_type", "dict_type"):
        return f"{key}: a mapping of keys belongs here (found {problem['input']!r})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind != "value_error" and not isinstance(problem["input"], dict):
        message += f" (found {problem['input']!r})"
    return f"{key}: {message}" if key else message
