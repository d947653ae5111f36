"""Orders of forwards and backwards of one optimizer step on one pipeline stage: pure functions, no communication."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """Run the forward ("F") or the backward ("B") of one micro-batch."""

    kind: Literal["F", "B"]
    micro: int


def gpipe(stage: int, stages: int, micros: int) -> Sequence[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965)."""
    return [Action("F", m) for m in range(micros)] + [Action("B", m) for m in range(micros)]


def one_f_one_b(stage: int, stages: int, micros: int) -> Sequence[Action]:
    """Warm up, then alternate one forward and one backward (PipeDream-Flush, arXiv 2006.09503).

    Holds at most ``stages - stage`` micro-batches of activations, where GPipe holds all.
    """
    warm = min(stages - 1 - stage, micros)
    actions = [Action("F", m) for m in range(warm)]
    for m in range(warm, micros):
        actions += [Action("F", m), Action("B", m - warm)]
    return actions + [Action("B", m) for m in range(micros - warm, micros)]


SCHEDULES: Mapping[str, Callable[[int, int, int], Sequence[Action]]] = {"1f1b": one_f_one_b, "gpipe": gpipe}


def bubble(stages: int, micros: int) -> float:
    """Return the idle share of a step: (p - 1) / (m + p - 1), for stages of equal cost."""
    return (stages - 1) / (micros + stages - 1)
