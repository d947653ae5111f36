"""ZeRO-3 stages on four ranks against one process that knows neither ranks nor DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.parallel.traffic import StepTraffic, Traffic
from tests.launch import ROOT, run
from tests.pipeline.model.helpers import whole_stage
from tests.pipeline.parallel.grid_worker import (
    ACCUMULATED,
    ALONE,
    BF16,
    CONNECTED,
    EACH,
    EQUAL,
    LEAVES,
    LR,
    NO_FLAG,
    NO_NORM,
    ONCE,
    PERSIST,
    POISONED,
    RANKS,
    RELEASED,
    TRAIN,
    UNCUT,
    UNRELEASED,
    ZERO1,
    ZERO2,
    Case,
    grid_spec,
    micro_batch,
    target_count,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
WORKER = ROOT / "tests/pipeline/parallel/grid_worker.py"
Tensors = Mapping[str, torch.Tensor]
Ranks = Sequence[dict[str, Any]]


@dataclass
class Reference:
    """What one process sees."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    weights: list[Tensors] = field(default_factory=list)


def reference(case: Case, skipped: int | None = None) -> Reference:
    """Train a case's whole model with torch alone; ``skipped`` is a step without an update."""
    return _reference(case.tied, case.layers, case.microbatches, skipped, case.connector)


@cache
def _reference(
    tied: bool, layers: int, micro_counts: tuple[int, ...], skipped: int | None, connector: str
) -> Reference:
    stage, seen = whole_stage(grid_spec(tied, layers, connector)), Reference()
    trained = {name: param for name, param in stage.named_parameters() if param.requires_grad}
    matrices = [param for param in trained.values() if param.dim() > 1]
    vectors = [param for param in trained.values() if param.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay)
    for step, count in enumerate(micro_counts):
        microbatches = [micro_batch(step, index, connector) for index in range(count)]
        optimizer.zero_grad()
        losses = [stage(None, inputs) for inputs in microbatches]
        for loss in losses:
            (loss * (1 / target_count(microbatches))).backward()  # as the runner scales: a division rounds differently
        seen.loss.append(sum(loss.item() for loss in losses) / target_count(microbatches))
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
    run(RANKS, WORKER, str(out), env={"PYTHONPATH": str(ROOT)}, timeout_s=900, launcher="srun").check()
    return out


def ranks_of(results: Path, case: Case) -> Ranks:
    return [torch.load(results / f"{case}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole(ranks: Ranks, kind: str, step: int, like: Tensors, case: Case) -> dict[str, torch.Tensor]:
    """Join flat shards that all ranks of all stages saw in a step to whole tensors."""
    shards, dp, joined = [rank[kind][step] for rank in ranks], RANKS // case.pp, {}
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


def gradients_differ_by(ranks: Ranks, case: Case, step: int) -> float:
    wanted = reference(case).gradients[step]
    return furthest(whole(ranks, "gradients", step, wanted, case), wanted)


def weights_differ_by(ranks: Ranks, case: Case, step: int, skipped: int | None = None) -> float:
    wanted = reference(case, skipped).weights[step]
    return furthest(whole(ranks, "weights", step, wanted, case), wanted)


@cache
def targets(step: int, count: int) -> int:
    return target_count([micro_batch(step, index) for index in range(count)])


def mean_losses(ranks: Ranks, case: Case) -> list[float]:
    steps = range(len(ranks[0]["loss"]))
    return [sum(rank["loss"][step] for rank in ranks) / targets(step, case.microbatches[step]) for step in steps]


def moved(rank: dict[str, Any], counted: str = "traffic") -> list[StepTraffic]:
    """What a rank moved in each step, in multiples of its stage."""
    trained, frozen = rank["parameters"]
    return [StepTraffic.of(Traffic(**step), trained=trained, frozen=frozen, size=4) for step in rank[counted]]


def settings(case: Case) -> dict[str, Any]:
    """What of a case must not change any result."""
    everything = asdict(case)
    apart = ("without", "poisoned", "deep", "bf16", "microbatches", "connector")
    odd = case.microbatches[0] // (RANKS // case.pp) % case.pp > 0
    everything |= {"checkpointing": case.checkpointing > 0, "odd": odd}
    return {name: value for name, value in everything.items() if name not in apart}


def go_together(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    excluded: Mapping[tuple[str, Any], Mapping[str, Any]] = {
        ("config", "zero1"): {"reduce_once": True, "gathered_fraction": 1.0, "persist": 0},
        ("config", "zero2"): {"reduce_once": False, "gathered_fraction": 1.0, "persist": 0},
        ("persist", PERSIST): {"gathered_fraction": 0.0},
        ("overlapped", True): {"gathered_fraction": 1.0, "persist": 0},
        ("pp", 1): {"odd": False},
    }
    if {one, other} == {("pp", 1), ("schedule", "interleaved")}:
        return False
    return all(excluded.get(a, {}).get(b[0], b[1]) == b[1] for a, b in ((one, other), (other, one)))


def test_any_two_settings_that_go_together_meet_in_some_case() -> None:
    met = {pair for case in EQUAL for pair in combinations(settings(case).items(), 2)}
    values = {name: {settings(case)[name] for case in EQUAL} for name in settings(ONCE)}
    for first, second in combinations(values, 2):
        for pair in product(product([first], values[first]), product([second], values[second])):
            assert pair in met or not go_together(*pair), pair


def test_the_reference_clips_and_trains() -> None:
    for tied in (False, True):
        seen = reference(Case(1, tied=tied))
        assert min(seen.norm) > TRAIN.clip_norm, "clipping is active in every step"
        assert furthest(seen.weights[-1], seen.weights[0]) > 1e-3


@pytest.mark.parametrize("case", EQUAL, ids=str)
def test_any_grid_equals_one_process(case: Case, results: Path) -> None:
    ranks, wanted = ranks_of(results, case), reference(case)
    assert mean_losses(ranks, case) == pytest.approx(wanted.loss, rel=2e-7)
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"], "one norm on all ranks, to the bit"
        assert rank["norm"] == pytest.approx(wanted.norm, rel=1e-6)
        assert len(set(rank["stack"])) == 1, "no step leaves anything behind"
    for step in (0, 1):  # beyond, the last bits of the weights have grown into the gradients
        assert gradients_differ_by(ranks, case, step) <= 1e-7, f"step {step}"
    assert weights_differ_by(ranks, case, -1) <= 1e-5


def test_stages_that_keep_their_weights_compute_what_plain_torch_computes_to_the_bit(results: Path) -> None:
    """Correction 9: without DeepSpeed's hooks nothing changes the order in which gradients are added up."""
    ranks, wanted = ranks_of(results, ALONE), reference(ALONE).gradients[0]
    found = whole(ranks, "gradients", 0, wanted, ALONE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("case", CONNECTED, ids=str)
def test_every_connector_on_a_grid_equals_one_process(case: Case, results: Path) -> None:
    """Under plain ZeRO-3, which gathers a module's weights only while the module runs."""
    ranks, wanted = ranks_of(results, case), reference(case)
    assert mean_losses(ranks, case) == pytest.approx(wanted.loss, rel=2e-7)
    for step in (0, 1):
        assert gradients_differ_by(ranks, case, step) <= 1e-7, f"step {step}"
    assert weights_differ_by(ranks, case, -1) <= 1e-5


@pytest.mark.parametrize("case", BF16, ids=str)
def test_in_bf16_the_gradients_of_micro_batches_add_up_in_fp32(case: Case, results: Path) -> None:
    """Correction 7, against the gradients of the same ranks' micro-batches one by one, added up in fp64."""
    for rank in ranks_of(results, case):
        (got,), (wanted,) = rank["gradients"], rank["one by one"]
        largest = max(float(grad.abs().max()) for grad in wanted.values())
        assert largest > 0 and got.keys() == wanted.keys()
        for name, grad in got.items():
            assert grad.dtype == torch.float32
            assert float((grad - wanted[name]).abs().max()) <= 1e-6 * largest, name


def test_without_the_group_local_order_check_sound_stages_are_refused() -> None:
    """Correction 1: DeepSpeed compares the modules of different stages, which rightly differ."""
    ended = run(RANKS, WORKER, env={"PYTHONPATH": str(ROOT)}, timeout_s=180, launcher="srun")
    assert ended.code != 0
    assert "disagreement on list length between rank0 and rank2" in ended.output


def test_without_the_backward_flag_gradients_are_lost(results: Path) -> None:
    """Correction 2: the loss is that of a sound run."""
    ranks = ranks_of(results, NO_FLAG)
    assert gradients_differ_by(ranks, NO_FLAG, 0) > 1e-3
    assert mean_losses(ranks, NO_FLAG) == pytest.approx(reference(NO_FLAG).loss, rel=2e-7)


def test_without_the_global_norm_stages_clip_and_skip_differently(results: Path) -> None:
    """Correction 3: DeepSpeed's own norm knows one stage only."""
    ranks = ranks_of(results, NO_NORM)
    assert weights_differ_by(ranks, NO_NORM, 1) > 1e-5
    assert [rank["applied"][NO_NORM.poisoned] for rank in ranks] == [True, True, False, False]


def test_with_accumulation_left_to_deepspeed_every_stage_divides_again(results: Path) -> None:
    """Correction 4."""
    ranks = ranks_of(results, ACCUMULATED)
    assert gradients_differ_by(ranks, ACCUMULATED, 0) > 1e-3
    assert not all(rank["applied"][0] for rank in ranks), "and the first step is taken for half a step"


def test_without_a_release_after_each_backward_the_stage_stays_gathered(results: Path) -> None:
    """Correction 5."""
    first_stage = ranks_of(results, UNRELEASED)[: RANKS // UNRELEASED.pp]
    assert min(max(rank["peak"]) for rank in first_stage) > 0.5


def test_without_a_cut_the_stack_of_running_modules_grows_with_every_step(results: Path) -> None:
    """Correction 6."""
    for rank in ranks_of(results, UNCUT):
        assert 0 < rank["stack"][0] < rank["stack"][1]


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_a_gradient_that_is_not_a_number_on_one_rank_skips_the_step_on_all(case: Case, results: Path) -> None:
    ranks, poisoned = ranks_of(results, case), case.poisoned
    assert poisoned is not None
    for rank in ranks:
        assert rank["applied"] == [step != poisoned for step in range(len(case.microbatches))]
        assert not math.isfinite(rank["norm"][poisoned])
        before, after = rank["weights"][poisoned - 1 : poisoned + 1]
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert weights_differ_by(ranks, case, -1, poisoned) <= 1e-5, "training goes on as if the step had not been"


@pytest.mark.parametrize("case", [ONCE, EACH], ids=str)
def test_weights_are_gathered_once_a_step_and_gradients_reduced_as_often_as_asked(case: Case, results: Path) -> None:
    for rank in ranks_of(results, case):
        for step, count in zip(moved(rank), case.microbatches, strict=True):
            assert 0.95 <= step.gather_x <= 1.1
            assert 0.99 <= step.reduce_x / (1 if case.reduce_once else count // 2) <= 1.1


@pytest.mark.parametrize("case", [RELEASED, LEAVES], ids=str)
def test_weights_that_are_released_are_gathered_again_for_each_micro_batch(case: Case, results: Path) -> None:
    for rank in ranks_of(results, case):
        assert max(rank["peak"]) <= 0.15
        for step in moved(rank):
            assert step.gather_x > 8, "at least once a micro-batch"
            assert 0.99 <= step.reduce_x / 8 <= 1.1


def test_layers_gathered_as_one_are_fewer_gathers_of_the_same_bytes(results: Path) -> None:
    single, leaves = (ranks_of(results, case)[1]["traffic"] for case in (RELEASED, LEAVES))
    for step in (0, 1):
        assert leaves[step]["gathers"] < single[step]["gathers"] / 2
        assert leaves[step]["gathered"] == pytest.approx(single[step]["gathered"], rel=0.05)
    for steps in (single, leaves):  # the second step knows what comes next, and gathers it with what is needed
        assert steps[1]["gathers"] < 0.8 * steps[0]["gathers"]


@pytest.mark.parametrize("case", [ZERO1, ZERO2], ids=str)
def test_zero_1_and_2_gather_once_after_the_update_and_nothing_within_a_step(case: Case, results: Path) -> None:
    for rank in ranks_of(results, case):
        within, after = moved(rank), moved(rank, "traffic of update")
        assert rank["whole"] == [1.0, 1.0, 1.0]
        assert within[1].gather_x == within[2].gather_x == 0
        assert all(0.99 <= step.gather_x <= 1.1 for step in after)
        for step, count in zip(within, case.microbatches, strict=True):
            assert 0.99 <= step.reduce_x / (1 if case is ZERO1 else count // 2) <= 1.1


def test_only_hidden_states_cross_stages(results: Path) -> None:
    for index, rank in enumerate(ranks_of(results, ONCE)):
        for step, counted in enumerate(rank["traffic"]):
            count = ONCE.microbatches[step] // 2
            own = [micro_batch(step, i) for i in range(2 * count)][count * (index % 2) :][:count]
            width = grid_spec(tied=False, layers=ONCE.layers).width
            assert counted["sent"] == sum(inputs.input_ids.numel() for inputs in own) * width * 4
