"""The grid of ranks, batch arithmetic, schedules and splits: pure functions against plain oracles."""

from __future__ import annotations

import itertools

import pytest

from data_prep.common.errors import UserError
from pipeline.data.order import BatchOrder
from pipeline.model.counts import ParamCounts
from pipeline.parallel.partition import split_layers, split_stages
from pipeline.parallel.topology import Topology, micro_batches
from tests.pipeline.model.helpers import tiny_spec


@pytest.mark.parametrize(("world", "pp"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_every_place_of_the_grid_is_taken_once(world: int, pp: int) -> None:
    grid = [Topology(world, rank, pp) for rank in range(world)]
    assert {(t.stage, t.dp_rank) for t in grid} == set(itertools.product(range(pp), range(world // pp)))
    for t in grid:
        assert t.rank_of(t.stage, t.dp_rank) == t.rank
        assert t.rank in t.stage_ranks(t.stage)
        assert t.stage_ranks(t.stage) == list(range(t.stage * t.dp, (t.stage + 1) * t.dp)), "a stage is contiguous"


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.pp=3 does not divide 4 ranks.*1, 2, 4"):
        Topology(4, 0, 3)
    with pytest.raises(UserError, match=r"train.global_batch_size=8 does not divide among 3"):
        micro_batches(8, 3, 0)
    with pytest.raises(UserError, match=r"micro_batches=3 does not divide the 4 rows"):
        micro_batches(8, 2, 3)


@pytest.mark.parametrize(("dp", "microbatches"), [(1, 1), (1, 12), (2, 3), (3, 4), (4, 1), (6, 2)])
def test_global_batches_do_not_depend_on_ranks(dp: int, microbatches: int) -> None:
    order = BatchOrder(12, dp, microbatches)
    for step in range(3):
        rows = [i for r in range(dp) for m in range(microbatches) for i in order.rows_of_microbatch(12 * step, r, m)]
        assert rows == list(order.global_rows(12 * step)) == list(range(12 * step, 12 * step + 12))


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
    ("text", "words"), [("4,5", "3 counts"), ("4,4,5", "add up to 12"), ("0,6,6", "at least 1"), ("a,b,c", "list")]
)
def test_split_by_hand_is_checked(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_layers(12, 3, layers_per_stage=text)
    assert [len(r) for r in split_layers(12, 3, layers_per_stage="3,4,5")] == [3, 4, 5]


def test_chunks_of_a_stage_are_every_so_manyth_piece() -> None:
    stages = split_stages(8, 2, 2, layers_per_stage="1,2,2,3")
    assert stages == ((range(0, 1), range(3, 5)), (range(1, 3), range(5, 8)))
    assert split_stages(8, 4, 1) == tuple((piece,) for piece in split_layers(8, 4))
    with pytest.raises(
        UserError, match=r"parallel.pp x parallel.virtual_stages = 12 .* 8 decoder layers: use at most 8"
    ):
        split_stages(8, 4, 3)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (6.0, 0.5), (2.5, 1.0), (1.0, 4.0)])
def test_stages_of_chunks_cost_about_the_same(before: float, after: float) -> None:
    """The dearest stage is within one layer of an even share, though one piece is much dearer than the others."""
    costs = [before, *[1.0] * 32, after]
    stages = split_stages(32, 4, 2, costs=costs)
    assert sorted(layer for own in stages for virtual_stage in own for layer in virtual_stage) == list(range(32))
    shares = [float(sum(map(len, own))) for own in stages]
    shares[0] += before
    shares[-1] += after
    assert max(shares) <= sum(costs) / 4 + 1
    assert min(shares) >= sum(costs) / 4 - 2


def test_stages_beside_a_dear_one_are_even() -> None:
    stages = split_stages(12, 4, 1, costs=[9.0, *[1.0] * 12, 0.0])
    assert len(stages[0][0]) == 1
    assert max(len(own[0]) for own in stages[1:]) - min(len(own[0]) for own in stages[1:]) <= 1


@pytest.mark.parametrize(("stages", "virtual_stages"), [(1, 1), (3, 1), (6, 1), (2, 2), (3, 2), (2, 3)])
def test_every_stage_trains_something_whatever_the_split(stages: int, virtual_stages: int) -> None:
    """DeepSpeed cannot run where nothing trains: each virtual stage has a decoder layer, whatever the tower costs."""
    counts = ParamCounts.of(tiny_spec(num_hidden_layers=6))
    assert counts.trained.vision == 0 < counts.vision
    for before, after in ((0.0, 0.0), (1e9, 0.0), (0.0, 1e9)):
        for stage, own in enumerate(split_stages(6, stages, virtual_stages, costs=[before, *[1.0] * 6, after])):
            layers = [layer for virtual_stage in own for layer in virtual_stage]
            trained, frozen = counts.of_stage(layers, first=stage == 0, last=stage == stages - 1)
            assert trained >= min(counts.layers) and bool(frozen) == (stage == 0)
