"""Estimates against sums done by hand, and the command that prints them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from pipeline.cli import main
from pipeline.commands.estimate import build_workload_estimate, work_shares
from pipeline.config.flags import parse
from pipeline.model.counts import Cost
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding, read_ds_config
from pipeline.parallel.partition import split_stages
from pipeline.parallel.schedule import bubble
from pipeline.planning.estimate import WorkloadEstimate

SHARES = (0.01, 0.3)
OFFLOADED = ("zero3_offload", "zero3_offload_params")
GRID = ["--train.global-batch-size", "16", "--parallel.micro-batches", "0"]


def load_of(*flags: str, ranks: int = 4, length: int = 512, zero: str = "zero3") -> WorkloadEstimate:
    config = parse(["--recipe", "demo_sft", *GRID, *flags]).config
    sharding = Sharding.of(read_ds_config(zero), config.parallel)
    spec = ModelSpec.resolve(config.model, vocab_size=500, image_tokens=None)
    return build_workload_estimate(config, sharding, spec, ranks=ranks, seq_len=length, shares=SHARES)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_states_of_all_ranks_sum_to_the_model(ranks: int, pp: int) -> None:
    """16 bytes of states a trained parameter beside its compute type (arXiv 1910.02054), 0 a frozen one."""
    load = load_of("--parallel.pp", str(pp), ranks=ranks)
    trained = load.split.counts.total - load.split.counts.vision
    summed = sum(load.memory(stage).states * load.dp for stage in range(pp))
    assert summed == pytest.approx(trained * (2 + 16) + load.split.counts.vision * 2)
    assert sum(work_shares(load)) == pytest.approx(1)


@pytest.mark.parametrize(("gathered_fraction", "once"), itertools.product([0.0, 0.5, 1.0], [False, True]))
def test_what_is_held_follows_the_settings(gathered_fraction: float, once: bool) -> None:
    load = load_of("--parallel.gathered-fraction", str(gathered_fraction), "--parallel.reduce-once", str(once).lower())
    trained, frozen = load.split.parameters(0)
    counts = load.split.counts
    largest = max(*counts.layers, counts.connector, counts.embed, counts.head)  # whole while it runs, whatever stays
    assert load.memory(0).gathered == 2 * max(gathered_fraction * (trained + frozen), largest) + 4 * once * trained


def test_zero_stages_differ_in_the_gradient_that_is_held() -> None:
    one, two, three = (load_of(zero=name).memory(0) for name in ("zero1", "zero2", "zero3"))
    trained, frozen = load_of().split.parameters(0)
    assert one == three, "ZeRO-3 gathered once a step and reduced once a step"
    assert (one.gathered - two.gathered, two.gathered) == (4 * trained, 2 * (trained + frozen))


def test_what_is_offloaded_is_counted_for_the_host() -> None:
    here, there, all_there = (load_of(zero=name).memory(0) for name in ("zero3", *OFFLOADED))
    trained, frozen = load_of().split.parameters(0)
    assert (there.host, all_there.host) == (trained * 16 / 4, trained * 16 / 4 + (trained + frozen) * 2 / 4)
    assert here.host == all_there.states == 0
    assert here.states == there.states + there.host == all_there.host


def test_activations_follow_schedule_and_recomputation() -> None:
    def activations(stage: int, *flags: str) -> float:
        three = ("--model.llm.config.num_hidden_layers", "3", "--parallel.layers-per-stage", "2,1")
        return load_of("--parallel.pp", "2", *three, *flags).memory(stage).activations

    assert activations(0) == 2 * 2 * activations(1), "two micro-batches alive, two layers each, against one and one"
    assert activations(0, "--parallel.schedule", "gpipe") == 4 * activations(0), "all 8 instead of 2"
    recomputed = [activations(0, "--train.gradient-checkpointing", value) for value in ("all", "auto", "true")]
    assert recomputed == [recomputed[0]] * 3 and recomputed[0] < activations(0) / 2
    assert activations(0, "--train.dtype", "fp32") == 2 * activations(0)


def test_auto_recomputes_as_few_layers_as_fit() -> None:
    load = load_of("--model.llm.config.num_hidden_layers", "12", "--train.gradient-checkpointing", "auto")
    need = {every: load.memory(0, every).total for every in (0, 8, 4, 3, 2, 1)}
    assert list(need.values()) == sorted(need.values(), reverse=True) and need[1] < need[2] < need[0]
    assert [load.recomputation_for(0, available) for available in need.values()] == list(need)
    assert load.recomputation_for(0, need[0] - 1) == 8
    assert load.recomputation_for(0, 0.0) == 1, "the least memory there is; whether it fits is checked apart"
    assert load.memory(0) == load.memory(0, 1), "a start is refused where not even that fits"


def test_open_losses_hold_the_heads_gradient() -> None:
    def losses(stage: int, *flags: str) -> float:
        return load_of("--parallel.pp", "2", *flags).memory(stage).losses

    spec = load_of().spec
    assert losses(0) == 0 and losses(1) == 4 * spec.vocab_rows * spec.width
    assert losses(1, "--parallel.schedule", "gpipe") == load_of("--parallel.pp", "2").microbatches * losses(1)


@pytest.mark.parametrize("flags", [[], ["--parallel.schedule", "interleaved", "--parallel.virtual-stages", "2"]])
def test_every_part_of_the_model_is_the_work_of_one_chunk(flags: list[str]) -> None:
    load = load_of("--parallel.pp", "2", "--model.llm.config.num_hidden_layers", "6", *flags)
    work = [
        load.split.work(stage, virtual_stage)
        for stage, virtual_stages in enumerate(load.split.stage_layers)
        for virtual_stage in range(len(virtual_stages))
    ]
    assert sum(part.forward for part in work) == pytest.approx(sum(part.forward for part in load.split.costs))
    assert sum(part.backward for part in work) == pytest.approx(sum(part.backward for part in load.split.costs))
    assert flags or load.bubble > bubble(2, load.microbatches), "unequal stages wait longer than equal ones"
    virtual_stages = 3 if flags else 1
    costs = [Cost(0, 0), *[Cost(1, 2)] * 6, Cost(0, 0)]
    split = replace(load.split, costs=costs, stage_layers=split_stages(6, 2, virtual_stages))
    even = replace(load, split=split)
    assert even.bubble == pytest.approx(bubble(2, load.microbatches, virtual_stages))


def test_the_command_needs_neither_packs_nor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "demo_sft", "--ranks", "2", "4", "--seq-len", "512", "--parallel.pp", "2", *GRID]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "demo_sft on 2 ranks" in shown and "demo_sft on 4 ranks" in shown
    assert "(5.9% with equal stages)" in shown and "(11.1% with equal stages)" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "unknown recipe 'nonsense'"),
        (["demo_sft", "--ranks", "3", "--parallel.pp", "2"], "parallel.pp=2 does not divide 3 ranks"),
        (["demo_sft", "--seq-len", "8"], "cannot hold one image"),
        (["demo_sft", "--train.batch-packz", "4"], "unknown flag"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err
