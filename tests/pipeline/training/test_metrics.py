"""What a run reports: the file, the learning rate it follows, the peak its MFU is a share of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.packs import PackReader
from pipeline.config.schema import TrainSection
from pipeline.planning.hardware import known_peak
from pipeline.training.lr_schedule import learning_rate
from pipeline.training.metrics import (
    MetricsFile,
    StepStats,
    forget_events_from,
    samples_digest,
)
from pipeline.training.run.state import format_duration

STATS = StepStats(
    step=1, loss=2.5, lr=1e-3, grad_norm=0.5, applied=True, targets=3, tokens=8, images=1, consumed_packs=4,
    step_s=0.5, data_s=0.1, tokens_per_s=16.0, mfu=None, memory_gib=None,
)  # fmt: skip


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl", resume_step=0)
    metrics.write(replace(STATS, loss=math.nan, grad_norm=None, applied=False))
    metrics.write(replace(STATS, step=2, loss=math.inf))
    metrics.write(replace(STATS, step=3, images=0))
    metrics.close()
    assert [line["loss"] for line in lines(tmp_path / "m.jsonl")] == [None, None, 2.5]
    assert lines(tmp_path / "m.jsonl")[2]["images"] == 0


def test_a_resume_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 2, "lo')
    MetricsFile(path, resume_step=2).close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_digest_tells_samples_and_their_order_apart(small_demo: Path) -> None:
    packs = PackReader(small_demo / "packs/sft")
    digests = {samples_digest(packs, rows) for rows in (range(2), range(1, 3), range(1), range(1, -1, -1))}
    assert len(digests) == 4
    assert samples_digest(packs, range(2)) in digests
    assert packs.sources(3) == packs[3].source


def test_tensorboard_forgets_what_a_killed_start_wrote_beyond_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    for first, last, loss in ((1, 5, 1.0), (3, 4, 2.0)):  # the second start resumes from step 2
        writer = SummaryWriter(str(tmp_path), filename_suffix=str(first))
        forget_events_from(first, SimpleNamespace(tb_monitor=SimpleNamespace(summary_writer=writer)))
        for step in range(first, last + 1):
            writer.add_scalar("train/loss", loss, step)
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    forget_events_from(1, SimpleNamespace(tb_monitor=None))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        pytest.param("NVIDIA H100 80GB HBM3", 989.4, id="H100"),
        pytest.param("NVIDIA H100 PCIe", 756.5, id="a slower H100"),
        pytest.param("NVIDIA GH200 480GB", 989.4, id="GH200"),
        pytest.param("NVIDIA A100-SXM4-40GB", 312.0, id="A100"),
        pytest.param("NVIDIA RTX A1000", None, id="not an A100"),
        pytest.param("NVIDIA RTX A4000", None, id="not an A40"),
    ],
)
def test_a_device_is_known_by_whole_words(name: str, tflops: float | None) -> None:
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_the_rate_warms_up_to_the_peak_and_falls_to_the_floor() -> None:
    config = TrainSection(lr=1e-3, min_lr=1e-5, warmup_steps=10)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == 1e-3
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2) and rates[100] == pytest.approx(1e-5)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def rates_of(steps: int = 100, **options: Any) -> list[float]:
    config = TrainSection.model_validate({"lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 10, **options})
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


def test_other_schedules_share_the_warm_up_and_end_at_the_floor() -> None:
    cosine, constant = rates_of(), rates_of(schedule="constant")
    linear, wsd = rates_of(schedule="linear"), rates_of(schedule="wsd", decay_steps=20)
    assert cosine[:10] == constant[:10] == linear[:10] == wsd[:10]
    assert constant[9:] == [1e-3] * 92
    assert linear[55] == pytest.approx((1e-3 + 1e-5) / 2) and linear[100] == pytest.approx(1e-5)
    assert linear[10:] == pytest.approx([1e-5 + (1e-3 - 1e-5) * (100 - step) / 90 for step in range(10, 101)])
    assert wsd[9:81] == [1e-3] * 72
    assert wsd[80:] == pytest.approx([1e-5 + (1e-3 - 1e-5) * (100 - step) / 20 for step in range(80, 101)])


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42s"), (187, "3m07s"), (18_720, "5h12m")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
