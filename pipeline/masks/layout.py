"""Layout strings: a packed row in a few letters, for the command line, tests and documentation."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from data_prep.common.errors import UserError
from pipeline.masks.sidecars import Sidecars


class _Letter(NamedTuple):
    meaning: str
    modality: int
    generated: int


LETTERS = {
    "S": _Letter("system text", 0, 0),
    "V": _Letter("image", 1, 0),
    "W": _Letter("video", 2, 0),
    "U": _Letter("audio", 3, 0),
    "Q": _Letter("given text", 0, 0),
    "A": _Letter("generated text", 0, 1),
    "P": _Letter("padding", 0, 0),
}
LEGEND = ", ".join(f"{letter} {kind.meaning}" for letter, kind in LETTERS.items()) + ", | new segment"
EXAMPLE = "V64 Q12 A8 Q9 A5"
MAX_TOKENS = 1 << 20
"""Longest row a layout may describe."""


def parse_layout(text: str) -> Sidecars:
    """Read a layout such as ``V64 Q12 A8 Q9 A5 | V64 Q7 A3 P10``: letters with counts (default 1), spaces optional.

    S is system text, V an image, W a video, U audio, Q given text, A generated text, P padding. Every V, W or U is a
    separate medium; ``|`` starts a new packed sample, and so do tokens after padding.

    Raises UserError naming the first part that cannot be read, or a row that is too long.
    """
    columns: list[tuple[int, int, int, int]] = []
    segment, media, fresh = 0, 0, True
    for letter, count in _parts(text):
        if letter in "|P":
            fresh = True
            columns += [(0, 0, -1, 0)] * count
            continue
        segment, fresh = segment + fresh, False
        kind = LETTERS[letter]
        instance = media if kind.modality else -1
        media += bool(kind.modality)
        columns += [(segment, kind.modality, instance, kind.generated)] * count
    if not columns:
        raise UserError(f"the layout '{text}' holds no tokens: write one such as '{EXAMPLE}' ({LEGEND})")
    return Sidecars(*torch.tensor(columns).T.unbind())


def layout_letters(text: str) -> str:
    """Return the letter of every token of a layout; sidecars alone cannot tell system text from other given text.

    Raises UserError as :func:`parse_layout` does.
    """
    return "".join(letter * count for letter, count in _parts(text))


def parse_grid(text: str) -> tuple[int, int]:
    """Read a grid of patches such as ``27x27`` as (rows, columns). Raises UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text.strip().lower(), re.ASCII)
    if match is None:
        raise UserError(f"--grid {text}: write rows x columns of patches, such as 27x27")
    return int(match[1]), int(match[2])


def _parts(text: str) -> list[tuple[str, int]]:
    parts: list[tuple[str, int]] = []
    for match in re.finditer(r"\s*(?:(?P<bar>\|)|(?P<letter>[A-Za-z])(?P<count>[0-9]*)|(?P<bad>\S))", text):
        if match["bar"]:
            parts.append(("|", 0))
        elif match["bad"] or match["letter"].upper() not in LETTERS:
            raise UserError(
                f"cannot read '{match[0].strip()}' in the layout '{text}': write letters with counts such as "
                f"'{EXAMPLE}' ({LEGEND})"
            )
        else:
            digits = match["count"].lstrip("0")[:9]  # enough to exceed the limit, and never slow to parse
            parts.append((match["letter"].upper(), int(digits or (0 if match["count"] else 1))))
    if sum(count for _, count in parts) > MAX_TOKENS:
        raise UserError(f"a layout describes at most {MAX_TOKENS:,} tokens: lower its counts")
    return parts
