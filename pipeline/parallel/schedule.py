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
    microbatch: int
    virtual_stage: int = 0


def gpipe(stage: int, stages: int, microbatches: int, virtual_stages: int = 1) -> Sequence[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965); one chunk."""
    return [Action("F", m) for m in range(microbatches)] + [Action("B", m) for m in range(microbatches)]


def one_f_one_b(stage: int, stages: int, microbatches: int, virtual_stages: int = 1) -> Sequence[Action]:
    """Warm up, then alternate one forward and one backward (PipeDream-Flush, arXiv 2006.09503); one chunk.

    Holds at most ``stages - stage`` micro-batches of activations, where GPipe holds all.
    """
    warm = min(stages - 1 - stage, microbatches)
    return _alternate(
        [Action("F", m) for m in range(microbatches)], [Action("B", m) for m in range(microbatches)], warm
    )


def interleaved(stage: int, stages: int, microbatches: int, virtual_stages: int) -> Sequence[Action]:
    """1F1B over chunks: ``chunks`` times less bubble for as many times the messages (Megatron, arXiv 2104.04473).

    Micro-batches go through a stage's chunks in groups. Megatron's groups are of ``stages`` and must come out even;
    here they are larger where that makes them even, within one, and the short ones are filled up in thought: each
    stage then leaves out what does not exist, which cannot make an order deadlock.
    """
    groups = max(1, microbatches // stages)
    size = max(stages, -(-microbatches // groups))
    firsts = [group * microbatches // groups for group in range(groups + 1)]
    units: list[tuple[int | None, int]] = []
    for first, after in pairwise(firsts):
        group = [first + i if first + i < after else None for i in range(size)]
        units += [(microbatch, virtual_stage) for virtual_stage in range(virtual_stages) for microbatch in group]
    forwards = [
        None if microbatch is None else Action("F", microbatch, virtual_stage) for microbatch, virtual_stage in units
    ]
    backwards = [
        None if microbatch is None else Action("B", microbatch, virtual_stages - 1 - virtual_stage)
        for microbatch, virtual_stage in units
    ]
    warm = min(2 * (stages - 1 - stage) + (virtual_stages - 1) * size, len(units))
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


def downstream(stage: int, action: Action, stages: int, virtual_stages: int) -> tuple[int, Action] | None:
    """Return the (stage, action) that starts from this action's output; None for the loss and the first gradients."""
    return _along(stage, action, stages, virtual_stages, 1 if action.kind == "F" else -1)


def upstream(stage: int, action: Action, stages: int, virtual_stages: int) -> tuple[int, Action] | None:
    """Return the (stage, action) whose output this action starts from; None where tokens or the loss come in."""
    return _along(stage, action, stages, virtual_stages, -1 if action.kind == "F" else 1)


def _along(stage: int, action: Action, stages: int, virtual_stages: int, steps: int) -> tuple[int, Action] | None:
    place = stage + action.virtual_stage * stages + steps
    if not 0 <= place < stages * virtual_stages:
        return None
    return place % stages, action._replace(virtual_stage=place // stages)


def bubble(stages: int, microbatches: int, virtual_stages: int = 1) -> float:
    """Return the idle share of a step: (p - 1) / (v * m + p - 1), for chunks of equal cost and m >= p."""
    return (stages - 1) / (virtual_stages * microbatches + stages - 1)
