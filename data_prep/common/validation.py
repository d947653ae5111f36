"""Readable pydantic errors: one line per problem with the key, the problem and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import closest, did_you_mean, short_repr

Place = Sequence[int | str]
"""Where a value stands in nested settings."""
KnownKeys = Callable[[Place], Iterable[str]]
"""Returns the valid keys at the place of a misspelt one, for "did you mean"."""


def no_keys(place: Place) -> Iterable[str]:
    """Suggest nothing."""
    return ()


def problems(error: ValidationError, known: KnownKeys = no_keys, *, within: str = "") -> list[str]:
    """Return every problem as ``a.b.c: problem and fix``, misspelt keys first.

    Args:
        error: from one validation.
        known: see `KnownKeys`.
        within: dotted path of the validated value, such as ``zero_optimization``.
    """
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    meant = set(_meant(found, known))
    chosen = [problem for problem in found if (problem["type"], tuple(problem["loc"])) not in meant]
    return [line for problem in chosen for line in _lines(problem, known, within)]


def first_problem(error: ValidationError, known: KnownKeys = no_keys, *, within: str = "") -> str:
    """Return the first problem."""
    return problems(error, known, within=within)[0]


def report(origin: str, lines: Sequence[str]) -> str:
    """Return a single problem as one line, several as a list."""
    if len(lines) == 1:
        return f"{origin}: {lines[0]}"
    return "\n".join([f"{origin}: {len(lines)} problems", *(f"  - {line}" for line in lines)])


def dotted(place: Place) -> str:
    """Return a place in dotted form, such as ``packs.sft.seq_len``."""
    return ".".join(map(str, place))


def _meant(found: Sequence[Any], known: KnownKeys) -> Iterator[tuple[str, Place]]:
    """Yield the missing keys that are present but misspelt, so that each is reported once."""
    for problem in found:
        if problem["type"] == "extra_forbidden":
            *parent, name = problem["loc"]
            guess = closest(str(name), known(problem["loc"]))
            if guess:
                yield "missing", (*parent, guess)


def _lines(problem: Any, known: KnownKeys, within: str) -> list[str]:
    """Return the lines of a problem: a validator may report several, one per line of its message."""
    if problem["type"] != "value_error" or "\n" not in problem["msg"]:
        return [_line(problem, known, within)]
    key = dotted([*filter(None, [within]), *problem["loc"]])
    lines = str(problem["msg"]).removeprefix("Value error, ").splitlines()
    return [f"{key}: {line}" if key else line for line in lines]


def _line(problem: Any, known: KnownKeys, within: str) -> str:
    place, kind, value = problem["loc"], problem["type"], problem["input"]
    key = dotted([*filter(None, [within]), *place])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"unknown key {key}{did_you_mean(str(place[-1]), known(place))}"
    if kind == "missing":
        return f"{key} is missing: add it"
    if kind in ("model_type", "dict_type"):
        return f"{key}: expected a mapping of keys (found {short_repr(value)})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind != "value_error" or isinstance(value, str | int | float):
        message += f" (found {short_repr(value)})"
    return f"{key}: {message}" if key else message
