"""Orders of forwards and backwards of one optimizer step: pure functions, no communication.

A rank's decoder layers are one virtual stage, or several with the interleaved schedule. A micro-batch passes virtual
stage v of stage s at position ``s + v * stages`` of its way forward; the backward takes the reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

_Kind = TypeVar("_Kind")


class Action(NamedTuple):
    """Run the forward ("F") or the backward ("B") of one micro-batch through one virtual stage."""

    kind: Literal["F", "B"]
    microbatch: int
    virtual_stage: int = 0


def gpipe(stage: int, stages: int, microbatches: int, virtual_stages: int = 1) -> Sequence[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965); no virtual stages."""
    return [Action("F", m) for m in range(microbatches)] + [Action("B", m) for m in range(microbatches)]


def one_f_one_b(stage: int, stages: int, microbatches: int, virtual_stages: int = 1) -> Sequence[Action]:
    """Warm up, then alternate one forward and one backward (PipeDream-Flush, arXiv 2006.09503); no virtual stages.

    Holds at most ``stages - stage`` micro-batches of activations, where GPipe holds all.
    """
    warm = min(stages - 1 - stage, microbatches)
    return _alternate(
        [Action("F", m) for m in range(microbatches)], [Action("B", m) for m in range(microbatches)], warm
    )


def interleaved(stage: int, stages: int, microbatches: int, virtual_stages: int) -> Sequence[Action]:
    """1F1B over v virtual stages: v times less bubble and v times the messages (Megatron, arXiv 2104.04473).

    Micro-batches pass a stage's virtual stages in groups. Megatron requires groups of exactly ``stages`` micro-batches;
    here groups may be larger and differ by one. Short groups are padded with placeholders, which stages skip; skipping
    cannot cause a deadlock.
    """
    groups = max(1, microbatches // stages)
    size = max(stages, -(-microbatches // groups))
    firsts = [group * microbatches // groups for group in range(groups + 1)]
    slots: list[tuple[int | None, int]] = []
    for first, after in pairwise(firsts):
        group = [first + i if first + i < after else None for i in range(size)]
        slots += [(microbatch, virtual_stage) for virtual_stage in range(virtual_stages) for microbatch in group]
    forwards = [
        None if microbatch is None else Action("F", microbatch, virtual_stage) for microbatch, virtual_stage in slots
    ]
    backwards = [
        None if microbatch is None else Action("B", microbatch, virtual_stages - 1 - virtual_stage)
        for microbatch, virtual_stage in slots
    ]
    warm = min(2 * (stages - 1 - stage) + (virtual_stages - 1) * size, len(slots))
    return [action for action in _alternate(forwards, backwards, warm) if action is not None]


def forward_only(stage: int, stages: int, microbatches: int, virtual_stages: int = 1) -> Sequence[Action]:
    """All forwards, one virtual stage after the other: evaluation."""
    return [Action("F", m, v) for v in range(virtual_stages) for m in range(microbatches)]


def _alternate(forwards: Sequence[_Kind], backwards: Sequence[_Kind], warm: int) -> Sequence[_Kind]:
    """Run ``warm`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    actions = list(forwards[:warm])
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        actions += [forward, backward]
    return actions + list(backwards[len(forwards) - warm :])


Schedule = Callable[[int, int, int, int], Sequence[Action]]
"""(stage, stages, micro-batches, virtual stages) -> the stage's order."""

SCHEDULES: Mapping[str, Schedule] = {"1f1b": one_f_one_b, "gpipe": gpipe, "interleaved": interleaved}
ORDERS: Mapping[str, Schedule] = {**SCHEDULES, "forward_only": forward_only}
"""The schedules of training, and that of evaluation."""


def downstream(stage: int, action: Action, stages: int, virtual_stages: int) -> tuple[int, Action] | None:
    """Return the (stage, action) that uses this action's output; None for the loss and the first gradients."""
    return _along(stage, action, stages, virtual_stages, 1 if action.kind == "F" else -1)


def upstream(stage: int, action: Action, stages: int, virtual_stages: int) -> tuple[int, Action] | None:
    """Return the (stage, action) whose output this action uses; None for tokens and for the loss."""
    return _along(stage, action, stages, virtual_stages, -1 if action.kind == "F" else 1)


def _along(stage: int, action: Action, stages: int, virtual_stages: int, steps: int) -> tuple[int, Action] | None:
    place = stage + action.virtual_stage * stages + steps
    if not 0 <= place < stages * virtual_stages:
        return None
    return place % stages, action._replace(virtual_stage=place // stages)


def bubble(stages: int, microbatches: int, virtual_stages: int = 1) -> float:
    """Return the idle share of a step: (p - 1) / (v * m + p - 1), for virtual stages of equal cost and m >= p."""
    return (stages - 1) / (virtual_stages * microbatches + stages - 1)
