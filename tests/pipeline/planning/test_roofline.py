"""The predicted step against sums by hand, and against a roofline made by others for the paper's model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.step import AKI_4B
from pipeline.cli import main
from pipeline.commands.estimate import build_workload_estimate
from pipeline.config.schema import ConfigError, ModelConfig, RunConfig
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding, read_ds_config
from pipeline.planning.hardware import GPU_NAMES, PEAK_TFLOPS, Hardware
from pipeline.planning.roofline import FORWARD_OPERATORS, Roofline, Workload

IMAGES = 27 / 8192


def aki(*, ranks: int = 1, rows: int = 1, seq_len: int = 8192, gpu: str = "H200", **parallel: object) -> Roofline:
    model = ModelConfig.model_validate({key: {"config": value} for key, value in AKI_4B.items()})
    train = {"global_batch_size": rows, "dtype": "bf16"}
    config = RunConfig.model_validate({"model": model, "train": train, "parallel": parallel})
    spec = ModelSpec.resolve(config.model, vocab_size=32064, image_tokens=None)
    sharding = Sharding.of(read_ds_config("zero3"), config.parallel)
    load = build_workload_estimate(config, sharding, spec, ranks=ranks, seq_len=seq_len, shares=(IMAGES, 0.3))
    return Roofline(load, Workload(IMAGES, 0.3, 300), Hardware(gpu))


def test_aki_4b_on_an_h200_is_near_an_independent_roofline() -> None:
    """It has 650 ms: matrices 385, pointwise 134, attention 40, tower 70, the rest 20."""
    step = aki()
    parts = step.parts()
    assert parts["matrices"] == pytest.approx(0.385, rel=0.05) and parts["pointwise"] == pytest.approx(0.134, rel=0.1)
    assert step.step_s == pytest.approx(0.650, rel=0.1)
    assert step.tokens_per_s == pytest.approx(12_600, rel=0.1) and step.mfu == pytest.approx(0.31, rel=0.1)
    assert sum(parts.values()) == pytest.approx(step.step_s) and parts["communication"] == 0


def test_small_micro_batches_are_limited_by_the_host() -> None:
    large, small = aki(ranks=8, rows=8), aki(ranks=8, rows=8, seq_len=1024)
    assert small.is_host_bound and not large.is_host_bound
    assert large.parts()["host"] == pytest.approx(0, abs=1e-9) and small.parts()["host"] > 0.01
    assert small.tokens_per_s < large.tokens_per_s / 2
    action = small.action_times[0][0][0]
    assert action.host == pytest.approx(32 * FORWARD_OPERATORS * 10e-6) and action.seconds == action.host
    faster = replace(small, hardware=replace(small.hardware, host_us=1))
    assert not faster.is_host_bound and faster.step_s < small.step_s


@pytest.mark.parametrize(("pp", "schedule", "virtual"), [(1, "1f1b", 1), (2, "1f1b", 1), (4, "interleaved", 2)])
def test_parts_add_up_on_any_grid(pp: int, schedule: str, virtual: int) -> None:
    step = aki(ranks=16, rows=32, pp=pp, schedule=schedule, virtual_stages=virtual)
    assert sum(step.parts().values()) == pytest.approx(step.step_s)
    assert (step.parts()["bubble"] > 0) == (pp > 1) and step.message_s * (pp == 1) == 0
    assert step.tokens_per_s * step.step_s == pytest.approx(32 * 8192)
    assert step.images_per_s * step.step_s == pytest.approx(32 * 27 * pp / 16)


def test_what_a_rank_receives_is_what_zero_gathers_and_reduces() -> None:
    """Multiples of a stage's parameters, as traffic counts them: 1 held, 2 for every micro-batch not held."""
    held, released = (aki(ranks=8, rows=32, gathered_fraction=kept) for kept in (1.0, 0.0))
    counts = held.load.split.counts
    everything, trained = counts.total * 2 * 7 / 8, counts.trained.total * 2 * 7 / 8
    assert held.bytes_per_step(0) == pytest.approx({"gather": everything, "reduce": trained, "hidden": 0})
    assert released.bytes_per_step(0)["gather"] == pytest.approx(8 * everything)
    assert aki(ranks=8, rows=32, reduce_once=False).bytes_per_step(0)["reduce"] == pytest.approx(4 * trained)
    stages = aki(ranks=8, rows=32, pp=4)
    each = 16 * 8192 * 3072 * 2  # micro-batches x tokens x width x bytes
    assert [stages.bytes_per_step(stage)["hidden"] for stage in range(4)] == [each, 2 * each, 2 * each, each]


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    hardware = Hardware("H100", hop_us=0)
    assert hardware.collective_s(1e9, 1) == 0
    assert hardware.collective_s(1e9, 8) == pytest.approx(7 / 8 / 360)
    assert hardware.collective_s(1e9, 64) == pytest.approx(max(63 / 64 / 360, 7 / 8 / 320))
    slow = replace(hardware, network_gbs=5)
    assert slow.collective_s(1e9, 64) == pytest.approx(7 / 8 / (8 * 5 * 0.8))
    assert replace(hardware, hop_us=5).collective_s(0, 64, count=3) == pytest.approx(3 * 63 * 5e-6)
    assert slow.message_s(1e9, across_nodes=True) == pytest.approx(1 / 4)
    assert slow.message_s(1e9, across_nodes=False) == pytest.approx(1 / 360)


def test_every_known_gpu_has_a_peak_and_others_are_refused() -> None:
    assert set(GPU_NAMES) <= set(PEAK_TFLOPS)
    with pytest.raises(ConfigError, match="GPU TPU: known are H100"):
        Hardware("TPU")


def test_the_command_prints_the_prediction_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "demo_sft", "--ranks", "2", "--gpu", "A100", "--network-gbps", "200"]) == 0
    out = capsys.readouterr().out
    assert "predicted: " in out and "samples/s, MFU" in out and "the host limits it" in out
    assert "A100: 312 TFLOP/s in bf16" in out and "25 GB/s a GPU between nodes" in out
    assert main(["estimate", "demo_sft", "--deepspeed", "zero3_offload"]) == 0
    assert "the roofline knows neither fp32 nor offload" in capsys.readouterr().out
    assert main(["estimate", "demo_sft", "--gpu", "K80"]) == 2
