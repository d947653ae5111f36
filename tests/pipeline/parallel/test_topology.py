"""The grid of ranks, batch arithmetic, schedules and splits: pure functions against plain oracles."""

from __future__ import annotations

import itertools

import pytest

from data_prep.errors import UserError
from pipeline.data.order import BatchOrder
from pipeline.parallel.partition import split_layers
from pipeline.parallel.schedule import SCHEDULES, bubble
from pipeline.parallel.topology import Topology, micro_batches


@pytest.mark.parametrize(("world", "pp"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_every_place_of_the_grid_is_taken_once(world: int, pp: int) -> None:
    grid = [Topology(world, rank, pp) for rank in range(world)]
    assert {(t.stage, t.replica) for t in grid} == set(itertools.product(range(pp), range(world // pp)))
    for t in grid:
        assert t.rank_of(t.stage, t.replica) == t.rank
        assert t.rank in t.stage_ranks(t.stage)
        assert t.rank in t.replica_ranks(t.replica)
        assert t.stage_ranks(t.stage) == list(range(t.stage * t.dp, (t.stage + 1) * t.dp)), "a stage is contiguous"


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.pp=3 does not divide 4 ranks.*1, 2, 4"):
        Topology(4, 0, 3)
    with pytest.raises(UserError, match=r"train.batch_packs=8 cannot be shared by 3"):
        micro_batches(8, 3, 0)
    with pytest.raises(UserError, match=r"micro_batches=3 does not divide the 4 packs"):
        micro_batches(8, 2, 3)


@pytest.mark.parametrize(("replicas", "micros"), [(1, 1), (1, 12), (2, 3), (3, 4), (4, 1), (6, 2)])
def test_global_batches_do_not_depend_on_ranks(replicas: int, micros: int) -> None:
    order = BatchOrder(12, replicas, micros)
    for step in range(3):
        rows = [i for r in range(replicas) for m in range(micros) for i in order.micro_rows(12 * step, r, m)]
        assert rows == list(order.global_rows(12 * step)) == list(range(12 * step, 12 * step + 12))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "micros"), list(itertools.product([1, 2, 3, 4], [1, 2, 4, 7])))
def test_schedules_run_every_micro_batch_once_and_cannot_deadlock(name: str, stages: int, micros: int) -> None:
    """Simulates the stages: an action runs when its input has arrived; all must finish, in order, within memory."""
    queues = [list(SCHEDULES[name](stage, stages, micros)) for stage in range(stages)]
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


@pytest.mark.parametrize(
    ("layers", "stages", "ends"), [(7, 3, (2.5, 1.0)), (8, 4, (0.0, 0.0)), (5, 5, (9.0, 3.0)), (9, 2, (4.0, 0.5))]
)
def test_split_is_the_best_of_all_splits(layers: int, stages: int, ends: tuple[float, float]) -> None:
    costs = [ends[0], *[1.0 + 0.1 * (i % 3) for i in range(layers)], ends[1]]

    def worst(counts: tuple[int, ...]) -> float:
        edges = [0, *itertools.accumulate(counts)]
        sums = [sum(costs[1 + lo : 1 + hi]) for lo, hi in itertools.pairwise(edges)]
        return max(s + (ends[0] if i == 0 else 0) + (ends[1] if i == stages - 1 else 0) for i, s in enumerate(sums))

    brute = min(worst(c) for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers)
    got = split_layers(layers, stages, costs=costs)
    assert worst(tuple(len(r) for r in got)) == pytest.approx(brute)
    assert [i for r in got for i in r] == list(range(layers))


@pytest.mark.parametrize(
    ("text", "words"), [("4,5", "3 counts"), ("4,4,5", "sum to 12"), ("0,6,6", "at least 1"), ("a,b,c", "list")]
)
def test_split_by_hand_is_checked(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_layers(12, 3, by_hand=text)
    assert [len(r) for r in split_layers(12, 3, by_hand="3,4,5")] == [3, 4, 5]
