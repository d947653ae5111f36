"""Schedules, proved by simulating every small shape: nothing hangs, nothing is lost, and theory holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from pipeline.cli import main
from pipeline.commands.schedule import timeline
from pipeline.parallel.groups import neighbours
from pipeline.parallel.schedule import SCHEDULES, Action, bubble, downstream, upstream
from pipeline.parallel.simulation import orders, peak_in_flight, receives, simulate, unit_cost

SHAPES = [
    (name, stages, microbatches, virtual_stages)
    for name in SCHEDULES
    for stages in ((2, 3, 4, 5) if name == "interleaved" else (1, 2, 3, 4, 5))
    for microbatches in (*range(1, 12), 17)
    for virtual_stages in ((2, 3) if name == "interleaved" else (1,))
]


def cost(stage: int, action: Action) -> float:
    """A backward takes twice as long as a forward."""
    return 1.0 if action.kind == "F" else 2.0


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), list(itertools.product([1, 2, 3, 4], [1, 2, 4, 7])))
def test_schedules_run_every_micro_batch_once_and_cannot_deadlock(name: str, stages: int, microbatches: int) -> None:
    """Clocked by hand: an action runs when its input has arrived; all must finish, in order, within memory."""
    queues = [list(SCHEDULES[name](stage, stages, microbatches, 1)) for stage in range(stages)]
    done: list[set[tuple[str, int]]] = [set() for _ in range(stages)]
    clock = 0
    while any(queues):
        ready = [
            s for s, queue in enumerate(queues)
            if queue and (
                (queue[0].kind == "F" and (s == 0 or ("F", queue[0].microbatch) in done[s - 1]))
                or (queue[0].kind == "B" and ("F", queue[0].microbatch) in done[s]
                    and (s == stages - 1 or ("B", queue[0].microbatch) in done[s + 1]))
            )
        ]  # fmt: skip
        assert ready, f"deadlock: {queues}"
        for stage, action in [(s, queues[s].pop(0)) for s in ready]:
            done[stage].add((action.kind, action.microbatch))
            held = sum(kind == "F" for kind, _ in done[stage]) - sum(kind == "B" for kind, _ in done[stage])
            assert held <= (microbatches if name == "gpipe" else min(stages - stage, microbatches))
        clock += 1
    assert all(len(d) == 2 * microbatches for d in done)
    assert clock == 2 * (microbatches + stages - 1), "as long as theory says, for forwards and backwards of equal cost"
    assert 1 - 2 * microbatches / clock == pytest.approx(bubble(stages, microbatches))
    simulated = simulate(orders(name, stages, microbatches), lambda stage, action: 1.0)
    assert simulated.makespan == clock, "the simulation agrees"


def test_every_action_runs_once_and_after_what_it_needs() -> None:
    for name, stages, microbatches, virtual_stages in SHAPES:
        step = simulate(orders(name, stages, microbatches, virtual_stages), cost, virtual_stages)
        wanted = {Action(k, m, c) for k in ("F", "B") for m in range(microbatches) for c in range(virtual_stages)}  # type: ignore[arg-type]
        ends = {(stage, slot.action): slot.end for stage, slots in enumerate(step.slots) for slot in slots}
        for stage, slots in enumerate(step.slots):
            assert {slot.action for slot in slots} == wanted and len(slots) == len(wanted), (name, stages, microbatches)
            for action, start, _ in slots:
                peer = upstream(stage, action, stages, virtual_stages)
                assert peer is None or ends[peer] <= start
                assert action.kind == "F" or ends[stage, action._replace(kind="F")] <= start


def test_evaluation_runs_every_forward_once_without_a_deadlock() -> None:
    for stages, microbatches, virtual_stages in itertools.product((1, 2, 3, 4), (1, 2, 3, 7), (1, 2, 3)):
        step = simulate(orders("forward_only", stages, microbatches, virtual_stages), cost, virtual_stages)
        wanted = {Action("F", m, v) for m in range(microbatches) for v in range(virtual_stages)}
        for stage, slots in enumerate(step.slots):
            assert {slot.action for slot in slots} == wanted and len(slots) == len(wanted)
            coming = receives("forward_only", stage, stages, microbatches, virtual_stages)
            posted = [action for before in coming for action in before]
            assert len(posted) == sum(upstream(stage, a, stages, virtual_stages) is not None for a in wanted)


def test_the_bubble_is_that_of_theory_on_any_number_of_micro_batches() -> None:
    """For every number at least that of the stages, where Megatron's interleaved order needs a multiple."""
    for name, stages, microbatches, virtual_stages in SHAPES:
        step = simulate(orders(name, stages, microbatches, virtual_stages), cost, virtual_stages)
        if microbatches >= stages or virtual_stages == 1:
            assert step.bubble == pytest.approx(bubble(stages, microbatches, virtual_stages)), (
                name,
                stages,
                microbatches,
                virtual_stages,
            )
        else:
            assert step.bubble >= bubble(stages, microbatches, virtual_stages)


def test_activations_stay_within_bounds() -> None:
    for name, stages, microbatches, virtual_stages in SHAPES:
        group = max(stages, -(-microbatches // max(1, microbatches // stages)))
        for stage, order in enumerate(orders(name, stages, microbatches, virtual_stages)):
            held = peak_in_flight(order, [1.0] * virtual_stages)
            if name == "1f1b":
                assert held == min(stages - stage, microbatches)
            elif name == "gpipe":
                assert held == microbatches
            else:
                assert held <= min(
                    2 * (stages - 1 - stage) + (virtual_stages - 1) * group + 1, virtual_stages * microbatches
                )


def test_a_held_activation_counts_as_much_as_its_chunk() -> None:
    order = [Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("F", 1, 0), Action("B", 0, 0)]
    assert peak_in_flight(order, [3, 2]) == 6


def step_ends(
    of_stages: Sequence[Sequence[Action]], posted: Sequence[Sequence[Sequence[Action]]], virtual_stages: int
) -> bool:
    """Whether a step ends on GPUs, all of whose actions synchronise the device as they are launched.

    Then an action waits for every receive posted so far, whoever it is for, and for every message sent so far to be
    received: that is, until the actions that send them have run, and the receives been posted.
    """
    stages, places = len(of_stages), [{action: i for i, action in enumerate(order)} for order in of_stages]
    done, received = [0] * stages, [set(rows[0]) for rows in posted]
    coming = [set(rows[0]) for rows in posted]
    sent: list[list[tuple[int, Action]]] = [[] for _ in range(stages)]

    def goes_on(stage: int) -> bool:
        sources = {action: upstream(stage, action, stages, virtual_stages) for action in coming[stage]}
        coming[stage] = {a for a, peer in sources.items() if peer and places[peer[0]][peer[1]] >= done[peer[0]]}
        sent[stage] = [(peer, action) for peer, action in sent[stage] if action not in received[peer]]
        return done[stage] < len(of_stages[stage]) and not coming[stage] and not sent[stage]

    while going := [stage for stage in range(stages) if goes_on(stage)]:
        for stage in going:
            sent[stage] += filter(None, [downstream(stage, of_stages[stage][done[stage]], stages, virtual_stages)])
            done[stage] += 1
            for row in posted[stage][done[stage] : done[stage] + 1]:
                received[stage].update(row)
                coming[stage].update(row)
    return done == [len(order) for order in of_stages]


def test_no_receive_is_posted_before_what_its_message_waits_for_may_be_launched() -> None:
    for name, stages, microbatches, virtual_stages in SHAPES:
        of_stages = orders(name, stages, microbatches, virtual_stages)
        posted = [receives(name, stage, stages, microbatches, virtual_stages) for stage in range(stages)]
        assert step_ends(of_stages, posted, virtual_stages), (name, stages, microbatches, virtual_stages)


@pytest.mark.slow
def test_no_shape_of_up_to_eight_stages_micro_batches_and_virtual_stages_deadlocks() -> None:
    """Every shape, with streams that synchronise at each launch: the worst case of receives that are posted ahead."""
    shapes = [(name, *grid, 1) for name in ("1f1b", "gpipe") for grid in itertools.product(range(1, 9), repeat=2)]
    shapes += [("interleaved", *grid) for grid in itertools.product(range(2, 9), range(1, 9), range(2, 9))]
    for name, stages, microbatches, virtual_stages in shapes:
        of_stages = orders(name, stages, microbatches, virtual_stages)
        posted = [receives(name, stage, stages, microbatches, virtual_stages) for stage in range(stages)]
        assert step_ends(of_stages, posted, virtual_stages), (name, stages, microbatches, virtual_stages)


def test_receives_two_actions_ahead_would_hang_a_step_that_synchronises() -> None:
    of_stages = orders("1f1b", 2, 4)
    ahead = [
        [[a for a in order[max(i + 2, 0) if i else 0 : i + 3] if upstream(stage, a, 2, 1)] for i in range(len(order))]
        for stage, order in enumerate(of_stages)
    ]
    assert not step_ends(of_stages, ahead, 1)


def test_messages_are_received_while_stages_compute() -> None:
    """Posted when the action is launched at the latest; in full pipelines a third of them before."""
    for name, stages, microbatches, virtual_stages in SHAPES:
        early = total = 0
        for stage, order in enumerate(orders(name, stages, microbatches, virtual_stages)):
            rows = receives(name, stage, stages, microbatches, virtual_stages)
            places = {action: index for index, row in enumerate(rows) for action in row}
            assert set(places) == {action for action in order if upstream(stage, action, stages, virtual_stages)}
            assert all(places[action] <= order.index(action) for action in places)
            early += sum(places[action] < order.index(action) for action in places)
            total += len(places)
        assert microbatches < 2 * stages or early >= total // 3, (name, stages, microbatches, virtual_stages)


def test_receives_in_flight_are_few_however_many_micro_batches() -> None:
    for name, stages, _, virtual_stages in {(n, s, 0, c) for n, s, _, c in SHAPES}:
        for microbatches in (2 * stages - 1, 2 * stages, 5 * stages):
            for stage, order in enumerate(orders(name, stages, microbatches, virtual_stages)):
                held = most = 0
                for action, coming in zip(
                    order, receives(name, stage, stages, microbatches, virtual_stages), strict=True
                ):
                    most = max(most, held := held + len(coming))
                    held -= upstream(stage, action, stages, virtual_stages) is not None
                assert held == 0 and most <= (2 if virtual_stages == 1 else stages + 2), (
                    name,
                    stages,
                    microbatches,
                    virtual_stages,
                    stage,
                )


def test_messages_of_a_pair_are_received_in_the_order_they_are_sent() -> None:
    """Each ordered pair of ranks is a queue: messages carry no names."""
    for name, stages, microbatches, virtual_stages in SHAPES:
        of_stages = orders(name, stages, microbatches, virtual_stages)
        for source, target in itertools.permutations(range(stages), 2):
            fed = (downstream(source, action, stages, virtual_stages) for action in of_stages[source])
            sent = [each[1] for each in fed if each is not None and each[0] == target]
            received = [a for row in receives(name, target, stages, microbatches, virtual_stages) for a in row]
            assert sent == [
                a for a in received if (upstream(target, a, stages, virtual_stages) or (None,))[0] == source
            ]
            used = [a for a in of_stages[target] if a in sent]
            assert virtual_stages > 1 or sent == used, "without virtual stages they are used in that order, too"
            assert not sent or (source, target) in neighbours(stages, virtual_stages > 1), "on a link"
            for action in sent:
                assert downstream(*upstream(target, action, stages, virtual_stages), stages, virtual_stages) == (
                    target,
                    action,
                )  # type: ignore[misc]


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
    assert lines == [  # no terminal: no colours, a bar starts each action
        "stage 0  |F0|F1......|B0---|F2|B1---...|B2---",
        "stage 1  ...|F0|B0---|F1|B1---|F2|B2---......",
    ]
    step = simulate(orders("1f1b", 2, 3), unit_cost)
    coloured = ["stage 0  01··0-21-·2-", "stage 1  ·00-11-22-··"]
    assert [line.plain for line in timeline(step, digits=1)] == coloured
    assert "bubble 25.0% of the step (theory 25.0%)" in costs and "at most 2, 1 micro-batches" in costs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--virtual-stages", "2"], "virtual_stages=2 needs schedule=interleaved"),
        (["--schedule", "interleaved", "--virtual-stages", "2", "--pp", "1"], "set pp to 2 or more"),
        (["--pp", "0"], "argument --pp: '0' is not a whole number above 0"),
        (["--micro-batches", "0"], "argument --micro-batches: '0' is not a whole number above 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *words]) == 2
    assert message in capsys.readouterr().err
