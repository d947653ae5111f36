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


def parse_layout(text: str) -> Sidecars:
    """Read a layout such as ``V64 Q12 A8 Q9 A5 | V64 Q7 A3 P10``: letters with counts (1 without), spaces optional.

    Each V, W or U is a medium of its own; ``|`` begins a new packed sample, as does whatever follows padding. Letter
    by letter: S system text, V image, W video, U audio, Q given text, A generated text, P padding.

    Raises UserError naming the first part that cannot be read.
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


def _parts(text: str) -> list[tuple[str, int]]:
    batches = []
    for match in re.finditer(r"\s*(?:(?P<bar>\|)|(?P<letter>[A-Za-z])(?P<count>\d*)|(?P<bad>\S))", text):
        if match["bar"]:
            batches.append(("|", 0))
        elif match["bad"] or match["letter"].upper() not in LETTERS:
            raise UserError(
                f"cannot read '{match[0].strip()}' in the layout '{text}': write letters with counts such as "
                f"'{EXAMPLE}' ({LEGEND})"
            )
        else:
            batches.append((match["letter"].upper(), int(match["count"] or 1)))
    return batches
