"""A simulated step of a schedule: the time of every action on every stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pipeline.parallel.schedule import ORDERS, Action, upstream

Cost = Callable[[int, Action], float]
"""(stage, action) -> its duration, in any unit."""


def unit_cost(stage: int, action: Action) -> float:
    """Return 1 for a forward and 2 for a backward, which is about twice the work."""
    return 1.0 if action.kind == "F" else 2.0


class Slot(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One step of a pipeline."""

    slots: tuple[tuple[Slot, ...], ...]
    """The actions of each stage, in order."""

    @property
    def makespan(self) -> float:
        """Time from the first forward to the last backward."""
        return max(slots[-1].end for slots in self.slots)

    @property
    def bubble(self) -> float:
        """Mean share of the step in which a stage is idle."""
        busy = sum(slot.end - slot.start for slots in self.slots for slot in slots)
        return 1 - busy / (len(self.slots) * self.makespan)


def orders(schedule: str, stages: int, microbatches: int, virtual_stages: int = 1) -> list[Sequence[Action]]:
    """Return the order of every stage."""
    return [ORDERS[schedule](stage, stages, microbatches, virtual_stages) for stage in range(stages)]


def simulate(
    of_stages: Sequence[Sequence[Action]], cost: Cost, virtual_stages: int = 1, *, message: float = 0.0
) -> Simulation:
    """Run every stage's actions in its order, each as soon as its input exists.

    Args:
        of_stages: The actions of each stage, in order.
        cost: The duration of each.
        virtual_stages: Virtual stages of each stage.
        message: Time from the end of an action until its result is on the next stage; neither stage is busy with it.

    Raises:
        RuntimeError: The schedule deadlocks.
    """
    stages = len(of_stages)
    done: dict[tuple[int, Action], float] = {}
    slots: list[list[Slot]] = [[] for _ in range(stages)]
    while sum(map(len, slots)) < sum(map(len, of_stages)):
        before = len(done)
        for stage, order in enumerate(of_stages):
            while len(slots[stage]) < len(order):
                action = order[len(slots[stage])]
                ready = _ready(stage, action, done, stages, virtual_stages, message)
                if ready is None:
                    break
                start = max(ready, slots[stage][-1].end if slots[stage] else 0.0)
                done[stage, action] = start + cost(stage, action)
                slots[stage].append(Slot(action, start, done[stage, action]))
        if len(done) == before:
            raise RuntimeError(f"the schedule deadlocks after {before} actions")
    return Simulation(tuple(map(tuple, slots)))


def _ready(
    stage: int,
    action: Action,
    done: dict[tuple[int, Action], float],
    stages: int,
    virtual_stages: int,
    message: float,
) -> float | None:
    """Return when an action's inputs are ready; None while one of them is missing."""
    peer = upstream(stage, action, stages, virtual_stages)
    wanted = [peer] if peer else []
    if action.kind == "B":
        wanted.append((stage, action._replace(kind="F")))
    if not all(each in done for each in wanted):
        return None
    return max((done[each] + (message if each[0] != stage else 0.0) for each in wanted), default=0.0)


@lru_cache(maxsize=64)
def receives(
    schedule: str, stage: int, stages: int, microbatches: int, virtual_stages: int = 1
) -> Sequence[Sequence[Action]]:
    """Return, for each action of a stage, the actions whose receives are posted just before it, in order.

    On a GPU a posted receive is a kernel that waits for its message, and a send is a kernel that waits for its receive.
    Anything launched later that synchronises the device (loading a kernel, freeing memory) waits for all of them. So a
    receive is posted before the first action that starts, on the simulated clock, after the sending action. An action
    then only waits for actions that start earlier, so a step cannot deadlock even if every action synchronises, and
    messages still overlap with the receiver's compute.
    """
    of_stages = orders(schedule, stages, microbatches, virtual_stages)
    step = simulate(of_stages, unit_cost, virtual_stages)
    turns = {(peer, slot.action): (slot.start, peer) for peer, slots in enumerate(step.slots) for slot in slots}
    senders = ((action, upstream(stage, action, stages, virtual_stages)) for action in of_stages[stage])
    coming = deque(sorted((turns[sender], action) for action, sender in senders if sender is not None))
    posted: list[list[Action]] = []
    for action in of_stages[stage]:
        posted.append([])
        while coming and coming[0][0] < turns[stage, action]:
            posted[-1].append(coming.popleft()[1])
    return posted


def peak_in_flight(order: Sequence[Action], sizes: Sequence[float]) -> float:
    """Return the peak of the activations a stage holds; a micro-batch of virtual stage v counts ``sizes[v]``."""
    held = most = 0.0
    for action in order:
        held += sizes[action.virtual_stage] if action.kind == "F" else -sizes[action.virtual_stage]
        most = max(most, held)
    return most
