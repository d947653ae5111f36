"""Conversations of several turns: which of their turns a sample holds, and which of its answers are supervised.

Under Modality-Mutual Attention an image may read the given text that follows it up to the next supervised answer. So
the setting decides what images read, and what that costs:

``every``
    One sample; every answer is supervised; an image reads the text of its own turn.
``first``
    One sample that ends with the first answer (as the released AKI does); the rest is left out.
``expand``
    One sample for each answer: all before it is given, earlier answers too, so every image reads every question up to
    the last one. The same tokens are supervised as with ``every``; the history is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from data_prep.example import Example

Turns: TypeAlias = Literal["every", "first", "expand"]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The turns of an example that become one sample."""

    example: Example
    left_out: int = 0
    """Answers that no sample holds."""
    repeated: int = 0
    """Turns at its beginning that the excerpt before holds too."""


def excerpts(example: Example, turns: Turns) -> Iterator[Excerpt]:
    """Yield what one example becomes; at least one excerpt. Documents have no turns and stay whole.

    With ``expand`` ids get the number of the answer: ``ID#1``, ``ID#2``, ...
    """
    answers = [place for place, turn in enumerate(example.turns) if turn.role == "assistant"]
    if turns == "every" or example.kind == "document" or not answers:
        yield Excerpt(example)
    elif turns == "first":
        yield Excerpt(replace(example, turns=example.turns[: answers[0] + 1]), left_out=len(answers) - 1)
    else:
        repeated = 0
        for number, place in enumerate(answers, start=1):
            part = replace(example, id=f"{example.id}#{number}", turns=example.turns[: place + 1])
            yield Excerpt(part, repeated=repeated)
            repeated = place + 1
