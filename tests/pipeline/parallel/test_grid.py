"""ZeRO-3 stages on four ranks against one process that knows neither ranks nor DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.parallel.traffic import StepTraffic, Traffic
from tests.launch import ROOT, run
from tests.pipeline.model.helpers import whole_stage
from tests.pipeline.parallel.grid_worker import (
    BROKEN,
    CASES,
    LR,
    MICROS,
    POISONED,
    POISONED_STEP,
    RANKS,
    TRAFFIC,
    TRAIN,
    Case,
    grid_spec,
    micro_batch,
    target_count,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
WORKER = ROOT / "tests/pipeline/parallel/grid_worker.py"
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Reference:
    """What one process sees."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    weights: list[Tensors] = field(default_factory=list)


def reference(case: Case, skipped: int | None = None) -> Reference:
    """Train a case's whole model with torch alone; ``skipped`` is a step without an update."""
    return _reference(case.tied, case.layers, case.micros, skipped)


@cache
def _reference(tied: bool, layers: int, micro_counts: tuple[int, ...], skipped: int | None) -> Reference:
    stage, seen = whole_stage(grid_spec(tied, layers)), Reference()
    trained = {name: param for name, param in stage.named_parameters() if param.requires_grad}
    matrices = [param for param in trained.values() if param.dim() > 1]
    vectors = [param for param in trained.values() if param.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay)
    for step, count in enumerate(micro_counts):
        micros = [micro_batch(step, index) for index in range(count)]
        optimizer.zero_grad()
        losses = [stage(None, inputs) for inputs in micros]
        for loss in losses:
            (loss / target_count(micros)).backward()
        seen.loss.append(sum(loss.item() for loss in losses) / target_count(micros))
        seen.gradients.append({name: param.grad.clone() for name, param in trained.items()})  # type: ignore[union-attr]
        seen.norm.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), TRAIN.clip_norm)))
        if step != skipped:
            optimizer.step()
        seen.weights.append({name: param.detach().clone() for name, param in trained.items()})
    return seen


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, run inside one launch of four ranks."""
    out = tmp_path_factory.mktemp("grid")
    run(RANKS, WORKER, str(out), env={"PYTHONPATH": str(ROOT)}, timeout_s=900).check()
    return out


def ranks_of(results: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(results / f"{name}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole(shards: Sequence[Tensors], like: Tensors, case: Case) -> dict[str, torch.Tensor]:
    """Join flat shards of all ranks of all stages to whole tensors."""
    dp, joined = RANKS // case.pp, {}
    for stage in range(case.pp):
        own = shards[stage * dp : (stage + 1) * dp]
        for name in own[0]:
            shape = like["model.embed_tokens.weight" if name not in like else name].shape
            joined[name] = torch.cat([rank[name] for rank in own])[: shape.numel()].view(shape)
    return joined


def furthest(got: Tensors, wanted: Tensors) -> float:
    """Largest absolute difference; a second copy of a tied weight counts too."""
    assert wanted.keys() <= got.keys()
    pairs = [(got[name], wanted.get(name, wanted["model.embed_tokens.weight"])) for name in got]
    return max(float((a - b).abs().max()) for a, b in pairs)


@cache
def targets(step: int, count: int) -> int:
    return target_count([micro_batch(step, index) for index in range(count)])


def mean_losses(ranks: Sequence[dict[str, Any]], case: Case) -> list[float]:
    return [sum(rank["loss"][step] for rank in ranks) / targets(step, n) for step, n in enumerate(case.micros)]


def test_the_reference_clips_and_trains() -> None:
    for tied in (False, True):
        seen = reference(Case(1, tied=tied))
        assert min(seen.norm) > TRAIN.clip_norm, "clipping is active in every step"
        assert furthest(seen.weights[-1], seen.weights[0]) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_any_grid_equals_one_process(name: str, results: Path) -> None:
    case, ranks = CASES[name], ranks_of(results, name)
    wanted = reference(case)
    assert mean_losses(ranks, case) == pytest.approx(wanted.loss, rel=2e-7)
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"], "one norm on all ranks, to the bit"
        assert rank["norm"] == pytest.approx(wanted.norm, rel=1e-6)
    for step in (0, 1):  # beyond, the last bits of the weights have grown into the gradients
        got = whole([rank["gradients"][step] for rank in ranks], wanted.gradients[step], case)
        assert furthest(got, wanted.gradients[step]) <= 1e-7, f"step {step}"
    got = whole([rank["weights"][-1] for rank in ranks], wanted.weights[-1], case)
    assert furthest(got, wanted.weights[-1]) <= 1e-5


def test_without_the_backward_flag_gradients_are_lost(results: Path) -> None:
    """Correction 2: the loss is that of a sound run."""
    case, ranks = BROKEN["backward-flag"], ranks_of(results, "backward-flag")
    wanted = reference(case)
    got = whole([rank["gradients"][0] for rank in ranks], wanted.gradients[0], case)
    assert furthest(got, wanted.gradients[0]) > 1e-3
    assert sum(rank["loss"][0] for rank in ranks) / targets(0, MICROS[0]) == pytest.approx(wanted.loss[0], rel=2e-7)


def test_without_the_global_norm_stages_clip_differently(results: Path) -> None:
    """Correction 3: DeepSpeed's own norm knows one stage only."""
    case, ranks = BROKEN["global-norm"], ranks_of(results, "global-norm")
    wanted = reference(case)
    got = whole([rank["weights"][-1] for rank in ranks], wanted.weights[-1], case)
    assert furthest(got, wanted.weights[-1]) > 1e-5


def test_without_the_global_norm_one_stage_skips_while_the_other_steps(results: Path) -> None:
    applied = [rank["applied"][POISONED_STEP] for rank in ranks_of(results, "global-norm-poisoned")]
    assert applied == [True, True, False, False]


def test_with_accumulation_left_to_deepspeed_every_stage_divides_again(results: Path) -> None:
    """Correction 4."""
    case, ranks = BROKEN["one-accumulation"], ranks_of(results, "one-accumulation")
    wanted = reference(case)
    got = whole([rank["gradients"][0] for rank in ranks], wanted.gradients[0], case)
    assert furthest(got, wanted.gradients[0]) > 1e-3
    assert not all(rank["applied"][0] for rank in ranks), "and the first step is taken for half a step"


def test_without_the_group_local_order_check_sound_stages_are_refused() -> None:
    """Correction 1: DeepSpeed compares the modules of different stages, which rightly differ."""
    ended = run(RANKS, WORKER, env={"PYTHONPATH": str(ROOT)}, timeout_s=180)
    assert ended.code != 0
    assert "disagreement on list length between rank0 and rank2" in ended.output


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_not_a_number_on_one_rank_skips_the_step_on_all(name: str, results: Path) -> None:
    case, ranks = POISONED[name], ranks_of(results, name)
    wanted = reference(case, skipped=POISONED_STEP)
    for rank in ranks:
        assert rank["applied"] == [step != POISONED_STEP for step in range(len(MICROS))]
        assert not math.isfinite(rank["norm"][POISONED_STEP])
        before, after = rank["weights"][POISONED_STEP - 1 : POISONED_STEP + 1]
        assert all(torch.equal(before[key], after[key]) for key in before)
    got = whole([rank["weights"][-1] for rank in ranks], wanted.weights[-1], case)
    assert furthest(got, wanted.weights[-1]) <= 1e-5, "training goes on as if the step had not been"


@pytest.mark.parametrize("name", [name for name, case in TRAFFIC.items() if case.config == "zero3"])
def test_traffic_of_a_step_of_eight_micro_batches(name: str, results: Path) -> None:
    """Weights are gathered and gradients reduced once a step where the settings say so."""
    case, ranks = TRAFFIC[name], ranks_of(results, name)
    for rank in ranks:
        trained, frozen = rank["parameters"]
        for counted in rank["traffic"]:
            moved = StepTraffic.of(Traffic(**counted), trained=trained, frozen=frozen, size=4)
            if case.resident == 1:
                assert 0.95 <= moved.gather_x <= 1.1
            else:
                assert moved.gather_x > 8, "at least once a micro-batch"
                assert max(rank["peak"]) <= 0.15
            assert 0.99 <= moved.reduce_x / (1 if case.reduce_once else 8) <= 1.1


def test_without_a_release_after_each_backward_the_stage_stays_gathered(results: Path) -> None:
    """Correction 5."""
    first_stage = ranks_of(results, "release")[: RANKS // BROKEN["release"].pp]
    assert min(max(rank["peak"]) for rank in first_stage) > 0.5


def test_layers_gathered_as_one_are_fewer_gathers_of_the_same_bytes(results: Path) -> None:
    single, leaves = (ranks_of(results, name)[1]["traffic"] for name in ("traffic-0-each", "traffic-leaves"))
    for step in (0, 1):
        assert leaves[step]["gathers"] < single[step]["gathers"] / 2
        assert leaves[step]["gathered"] == pytest.approx(single[step]["gathered"], rel=0.05)
    for steps in (single, leaves):  # the second step knows what comes next, and gathers it with what is needed
        assert steps[1]["gathers"] < 0.8 * steps[0]["gathers"]


@pytest.mark.parametrize("name", ["traffic-zero1", "traffic-zero2"])
def test_zero_1_and_2_gather_once_after_the_update_and_nothing_within_a_step(name: str, results: Path) -> None:
    for rank in ranks_of(results, name):
        trained, frozen = rank["parameters"]
        within, after = (
            [StepTraffic.of(Traffic(**counted), trained=trained, frozen=frozen, size=4) for counted in rank[part]]
            for part in ("traffic", "traffic of update")
        )
        assert rank["whole"] == [1.0, 1.0]
        assert within[1].gather_x == 0 and all(0.99 <= moved.gather_x <= 1.1 for moved in after)
        assert all(0.99 <= moved.reduce_x / (1 if name == "traffic-zero1" else 8) <= 1.1 for moved in within)


def test_only_hidden_states_cross_stages(results: Path) -> None:
    case = TRAFFIC["traffic-1-once"]
    width, dp = grid_spec(False).width, RANKS // case.pp
    for index, rank in enumerate(ranks_of(results, "traffic-1-once")):
        for step, counted in enumerate(rank["traffic"]):
            own = [micro_batch(step, i) for i in range(16)][8 * (index % dp) :][:8]
            assert counted["sent"] == sum(inputs.input_ids.numel() for inputs in own) * width * 4
