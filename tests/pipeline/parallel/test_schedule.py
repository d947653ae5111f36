"""Schedules, proved by simulating every small shape: nothing hangs, nothing is lost, and theory holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from pipeline.cli import main
from pipeline.parallel.runner import AHEAD
from pipeline.parallel.schedule import SCHEDULES, Action, bubble, feeds, needs
from pipeline.parallel.simulation import messages, most_held, orders, simulate

SHAPES = [
    (name, stages, micros, chunks)
    for name in SCHEDULES
    for stages in ((2, 3, 4, 5) if name == "interleaved" else (1, 2, 3, 4, 5))
    for micros in (*range(1, 12), 17)
    for chunks in ((2, 3) if name == "interleaved" else (1,))
]


def cost(stage: int, action: Action) -> float:
    """A backward takes twice as long as a forward."""
    return 1.0 if action.kind == "F" else 2.0


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "micros"), list(itertools.product([1, 2, 3, 4], [1, 2, 4, 7])))
def test_schedules_run_every_micro_batch_once_and_cannot_deadlock(name: str, stages: int, micros: int) -> None:
    """Clocked by hand: an action runs when its input has arrived; all must finish, in order, within memory."""
    queues = [list(SCHEDULES[name](stage, stages, micros, 1)) for stage in range(stages)]
    done: list[set[tuple[str, int]]] = [set() for _ in range(stages)]
    clock = 0
    while any(queues):
        ready = [
            s for s, queue in enumerate(queues)
            if queue and (
                (queue[0].kind == "F" and (s == 0 or ("F", queue[0].micro) in done[s - 1]))
                or (queue[0].kind == "B" and ("F", queue[0].micro) in done[s]
                    and (s == stages - 1 or ("B", queue[0].micro) in done[s + 1]))
            )
        ]  # fmt: skip
        assert ready, f"deadlock: {queues}"
        for stage, action in [(s, queues[s].pop(0)) for s in ready]:
            done[stage].add((action.kind, action.micro))
            held = sum(kind == "F" for kind, _ in done[stage]) - sum(kind == "B" for kind, _ in done[stage])
            assert held <= (micros if name == "gpipe" else min(stages - stage, micros))
        clock += 1
    assert all(len(d) == 2 * micros for d in done)
    assert clock == 2 * (micros + stages - 1), "as long as theory says, for forwards and backwards of equal cost"
    assert 1 - 2 * micros / clock == pytest.approx(bubble(stages, micros))
    simulated = simulate(orders(name, stages, micros), lambda stage, action: 1.0)
    assert simulated.makespan == clock, "the simulation agrees"


def test_every_action_runs_once_and_after_what_it_needs() -> None:
    for name, stages, micros, chunks in SHAPES:
        step = simulate(orders(name, stages, micros, chunks), cost, chunks)
        wanted = {Action(k, m, c) for k in ("F", "B") for m in range(micros) for c in range(chunks)}  # type: ignore[arg-type]
        ends = {(stage, slot.action): slot.end for stage, slots in enumerate(step.slots) for slot in slots}
        for stage, slots in enumerate(step.slots):
            assert {slot.action for slot in slots} == wanted and len(slots) == len(wanted), (name, stages, micros)
            for action, start, _ in slots:
                peer = needs(stage, action, stages, chunks)
                assert peer is None or ends[peer] <= start
                assert action.kind == "F" or ends[stage, action._replace(kind="F")] <= start


def test_the_bubble_is_that_of_theory_on_any_number_of_micro_batches() -> None:
    """For every number at least that of the stages, where Megatron's interleaved order needs a multiple."""
    for name, stages, micros, chunks in SHAPES:
        step = simulate(orders(name, stages, micros, chunks), cost, chunks)
        if micros >= stages or chunks == 1:
            assert step.bubble == pytest.approx(bubble(stages, micros, chunks)), (name, stages, micros, chunks)
        else:
            assert step.bubble >= bubble(stages, micros, chunks)


def test_activations_stay_within_bounds() -> None:
    for name, stages, micros, chunks in SHAPES:
        group = max(stages, -(-micros // max(1, micros // stages)))
        for stage, order in enumerate(orders(name, stages, micros, chunks)):
            held = most_held(order, [1.0] * chunks)
            if name == "1f1b":
                assert held == min(stages - stage, micros)
            elif name == "gpipe":
                assert held == micros
            else:
                assert held <= min(2 * (stages - 1 - stage) + (chunks - 1) * group + 1, chunks * micros)


def test_a_held_activation_counts_as_much_as_its_chunk() -> None:
    order = [Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("F", 1, 0), Action("B", 0, 0)]
    assert most_held(order, [3, 2]) == 6


def receives(of_stages: Sequence[Sequence[Action]], stage: int, chunks: int) -> tuple[int, int]:
    """Post receives as `Messages` does; return the most that wait at once and how many there were."""
    stages = len(of_stages)
    coming = {peer: messages(of_stages, peer, stage, chunks) for peer in range(stages) if peer != stage}
    posted: set[Action] = set()
    most = 0
    order = of_stages[stage]
    for index, action in enumerate(order):
        for upcoming in order[index : index + 1 + AHEAD]:
            peer = needs(stage, upcoming, stages, chunks)
            while peer is not None and upcoming not in posted:
                posted.add(coming[peer[0]].pop(0))
        most = max(most, len(posted))
        posted.discard(action)
    assert not posted and not any(coming.values()), "every message is received and used"
    return most, len(order)


def test_receives_in_flight_are_few_however_many_micro_batches() -> None:
    for name, stages, _, chunks in {(n, s, 0, c) for n, s, _, c in SHAPES}:
        for micros in (2 * stages, 5 * stages):
            for stage in range(stages):
                most, _ = receives(orders(name, stages, micros, chunks), stage, chunks)
                assert most <= AHEAD + 2, (name, stages, micros, chunks, stage)


def test_messages_of_a_pair_arrive_in_the_order_they_are_sent() -> None:
    """Each ordered pair of ranks is a queue: what one end sends is what the other expects, from either's order."""
    for name, stages, micros, chunks in SHAPES:
        of_stages = orders(name, stages, micros, chunks)
        for source, target in itertools.permutations(range(stages), 2):
            sent = messages(of_stages, source, target, chunks)
            awaited = [a for a in of_stages[target] if (needs(target, a, stages, chunks) or (None,))[0] == source]
            assert sorted(sent) == sorted(awaited)
            assert chunks > 1 or sent == awaited, "without chunks they are used in that order, too"
            assert not sent or abs(source - target) in (1, stages - 1), "neighbours on the ring"
            for action in awaited:
                assert feeds(*needs(target, action, stages, chunks), stages, chunks) == (target, action)  # type: ignore[misc]


def test_an_order_that_hangs_is_found() -> None:
    of_stages = orders("1f1b", 2, 2)
    with pytest.raises(RuntimeError, match="deadlocks after"):
        simulate([of_stages[0], list(reversed(of_stages[1]))], cost)


def test_unequal_stages_wait_for_the_slowest() -> None:
    step = simulate(orders("gpipe", 2, 4), lambda stage, action: 3.0 if stage == 0 else 1.0)
    assert step.makespan == 4 * 3 + 2 + 4 * 3, "stage 0 waits for a forward and a backward of stage 1"
    assert step.bubble == pytest.approx(1 - (8 * 3 + 8 * 1) / (2 * 26))


def test_a_step_is_drawn_to_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--pp", "2", "--micro-batches", "3"]) == 0
    *lines, costs = capsys.readouterr().out.splitlines()
    assert lines == ["stage 0  01··0-21-·2-", "stage 1  ·00-11-22-··"]
    assert "bubble 25.0% of the step (theory 25.0%)" in costs and "at most 2, 1 micro-batches" in costs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunks", "2"], "chunks=2 needs schedule=interleaved"),
        (["--schedule", "interleaved", "--chunks", "2", "--pp", "1"], "set pp to 2 or more"),
        (["--pp", "0"], "parallel.pp: Input should be greater than 0"),
        (["--micro-batches", "0"], "a step has at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *words]) == 2
    assert message in capsys.readouterr().err
