"""Multi-turn conversations: which turns a sample holds, and which answers are supervised.

Under Modality-Mutual Attention an image may attend to the given text that follows it, up to the next supervised answer.
This setting therefore decides what images attend to, and at what cost:

``every``
    One sample; every answer is supervised; an image attends to the text of its own turn.
``first``
    One sample that ends with the first answer, as in the released AKI; the rest is dropped.
``expand``
    One sample per answer. Everything before that answer is given, including earlier answers, so every image attends to
    every question so far. The same tokens are supervised as with ``every``; the history is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from data_prep.example import Example

Turns: TypeAlias = Literal["every", "first", "expand"]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Turns of an example that become one sample."""

    example: Example
    left_out: int = 0
    """Answers that are in no sample."""
    repeated: int = 0
    """Leading turns that the previous excerpt also holds."""


def excerpts(example: Example, turns: Turns) -> Iterator[Excerpt]:
    """Yield the excerpts of one example (at least one). Documents have no turns and stay whole.

    With ``expand``, ids get the number of the answer: ``ID#1``, ``ID#2``, ...
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
