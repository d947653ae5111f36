"""Printing text from corpora and paths: it is never markup, and never controls the terminal."""

from __future__ import annotations

import re

from rich.console import Console

from data_prep.common.console import PipeConsole

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def plain_console() -> Console:
    """Return a console on stdout that prints text as it is; styles come from ``Text`` and ``style=``."""
    return PipeConsole(highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Return text with control characters, lone surrogates and marks of direction replaced; line ends and tabs stay."""
    return _CONTROL.sub("\ufffd", text)
