"""Orders of forwards and backwards of one optimizer step: pure functions, no communication.

A rank's decoder layers are one chunk, or with the interleaved schedule several: chunk c of stage s is place
``s + c * stages`` of the line that a micro-batch walks along, forward and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

_Kind = TypeVar("_Kind")


class Action(NamedTuple):
    """Run the forward ("F") or the backward ("B") of one micro-batch through one chunk of a stage."""

    kind: Literal["F", "B"]
    micro: int
    chunk: int = 0


def gpipe(stage: int, stages: int, micros: int, chunks: int = 1) -> Sequence[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965); one chunk."""
    return [Action("F", m) for m in range(micros)] + [Action("B", m) for m in range(micros)]


def one_f_one_b(stage: int, stages: int, micros: int, chunks: int = 1) -> Sequence[Action]:
    """Warm up, then alternate one forward and one backward (PipeDream-Flush, arXiv 2006.09503); one chunk.

    Holds at most ``stages - stage`` micro-batches of activations, where GPipe holds all.
    """
    warm = min(stages - 1 - stage, micros)
    return _alternate([Action("F", m) for m in range(micros)], [Action("B", m) for m in range(micros)], warm)


def interleaved(stage: int, stages: int, micros: int, chunks: int) -> Sequence[Action]:
    """1F1B over chunks: ``chunks`` times less bubble for as many times the messages (Megatron, arXiv 2104.04473).

    Micro-batches go through a stage's chunks in groups. Megatron's groups are of ``stages`` and must come out even;
    here they are larger where that makes them even, within one, and the short ones are filled up in thought: each
    stage then leaves out what does not exist, which cannot make an order deadlock.
    """
    groups = max(1, micros // stages)
    size = max(stages, -(-micros // groups))
    firsts = [group * micros // groups for group in range(groups + 1)]
    units: list[tuple[int | None, int]] = []
    for first, after in pairwise(firsts):
        group = [first + i if first + i < after else None for i in range(size)]
        units += [(micro, chunk) for chunk in range(chunks) for micro in group]
    forwards = [None if micro is None else Action("F", micro, chunk) for micro, chunk in units]
    backwards = [None if micro is None else Action("B", micro, chunks - 1 - chunk) for micro, chunk in units]
    warm = min(2 * (stages - 1 - stage) + (chunks - 1) * size, len(units))
    return [action for action in _alternate(forwards, backwards, warm) if action is not None]


def _alternate(forwards: Sequence[_Kind], backwards: Sequence[_Kind], warm: int) -> Sequence[_Kind]:
    """Run ``warm`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    actions = list(forwards[:warm])
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        actions += [forward, backward]
    return actions + list(backwards[len(forwards) - warm :])


Schedule = Callable[[int, int, int, int], Sequence[Action]]
"""(stage, stages, micro-batches, chunks) -> the stage's order."""

SCHEDULES: Mapping[str, Schedule] = {"1f1b": one_f_one_b, "gpipe": gpipe, "interleaved": interleaved}


def feeds(stage: int, action: Action, stages: int, chunks: int) -> tuple[int, Action] | None:
    """Return the (stage, action) that starts from this action's output; None for the loss and the first gradients."""
    return _along(stage, action, stages, chunks, 1 if action.kind == "F" else -1)


def needs(stage: int, action: Action, stages: int, chunks: int) -> tuple[int, Action] | None:
    """Return the (stage, action) whose output this action starts from; None where tokens or the loss come in."""
    return _along(stage, action, stages, chunks, -1 if action.kind == "F" else 1)


def _along(stage: int, action: Action, stages: int, chunks: int, steps: int) -> tuple[int, Action] | None:
    place = stage + action.chunk * stages + steps
    if not 0 <= place < stages * chunks:
        return None
    return place % stages, action._replace(chunk=place // stages)


def bubble(stages: int, micros: int, chunks: int = 1) -> float:
    """Return the idle share of a step: (p - 1) / (v * m + p - 1), for chunks of equal cost and m >= p."""
    return (stages - 1) / (chunks * micros + stages - 1)
