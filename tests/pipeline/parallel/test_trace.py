"""Measured bubbles against theory, messages counted on the wire, and the trace of a step."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import torch

from pipeline.parallel.schedule import Action, bubble
from pipeline.parallel.trace import Recorder
from pipeline.parallel.traffic import Traffic
from tests.launch import ROOT, run
from tests.pipeline.parallel.bubble_worker import CASES, LONGER, MICROS, ROW
from tests.pipeline.parallel.grid_worker import RANKS, grid_spec

pytestmark = pytest.mark.slow
WORKER = ROOT / "tests/pipeline/parallel/bubble_worker.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One step of each schedule on ZeRO-3 stages that sleep."""
    out = tmp_path_factory.mktemp("bubble") / "seen.json"
    run(RANKS, WORKER, str(out), env={"PYTHONPATH": str(ROOT)}, timeout_s=300 * LONGER, launcher="srun").check()
    return dict(json.loads(out.read_text()))


def messages(name: str) -> int:
    """Messages of a step, over all dp ranks: each edge between virtual stages is passed forth and back."""
    case = CASES[name]
    return 2 * (case.pp * case.virtual_stages - 1) * MICROS * (RANKS // case.pp)


@pytest.mark.parametrize("name", CASES)
def test_the_measured_bubble_is_that_of_theory(name: str, seen: dict[str, dict[str, Any]]) -> None:
    """Within 0.05 of the step, for a busy machine; with ``BUBBLE_SLEEP=10``, within 0.005: 5 % of the least bubble."""
    theory = bubble(CASES[name].pp, MICROS, CASES[name].virtual_stages)
    print(f"{name}: bubble {seen[name]['bubble']:.4f}, {seen[name]['bubble'] / theory - 1:+.1%} of theory")
    assert seen[name]["bubble"] == pytest.approx(theory, abs=0.05 / LONGER)


@pytest.mark.parametrize(("pp", "gain"), [(2, 0.04), (4, 0.08)])
def test_chunks_make_the_bubble_smaller(pp: int, gain: float, seen: dict[str, dict[str, Any]]) -> None:
    """By half of what theory says, at least."""
    assert seen[f"pp{pp}-interleaved"]["bubble"] < seen[f"pp{pp}-1f1b"]["bubble"] - gain


@pytest.mark.parametrize("name", CASES)
def test_only_hidden_states_and_their_gradients_are_sent(name: str, seen: dict[str, dict[str, Any]]) -> None:
    sent = [size for rank in seen[name]["wire"] for size in rank]
    width = grid_spec(tied=False, layers=CASES[name].layers).width
    assert sent == [ROW.input_ids.numel() * width * 4] * messages(name)


@pytest.mark.parametrize("name", CASES)
def test_a_trace_shows_every_action_and_every_message(name: str, seen: dict[str, dict[str, Any]]) -> None:
    case, events = CASES[name], seen[name]["trace"]["traceEvents"]
    kinds = Counter(event.get("cat") for event in events if event["ph"] == "X")
    actions = RANKS * case.virtual_stages * MICROS
    assert kinds == {"forward": actions, "backward": actions, "wait": messages(name)}
    starts = {event["id"]: event["ts"] for event in events if event["ph"] == "s"}
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "f"}
    assert len(starts) == messages(name) and starts.keys() == ends.keys(), "every arrow has two ends"
    slack_us = 50_000  # clocks start together at a barrier, which a busy machine leaves one rank after the other
    assert all(ends[message] >= starts[message] - slack_us for message in starts)
    titles = {event["args"]["name"] for event in events if event["ph"] == "M"}
    dp = RANKS // case.pp
    assert titles == {f"stage {rank // dp}, dp rank {rank % dp} (rank {rank})" for rank in range(RANKS)}


def test_on_a_gpu_times_are_read_from_events_once_the_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the events of a stream: each is recorded at the next tick of 5 ms."""
    ticks, waited = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.tick = next(ticks)

        def elapsed_time(self, end: Event) -> float:
            return 5.0 * (end.tick - self.tick)

        def synchronize(self) -> None:
            waited.append(self.tick)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    traffic = Traffic()
    recorder = Recorder(torch.device("cuda"), traffic)
    with recorder.span("forward", "before the step"):
        pass
    recorder.begin()
    with recorder.span("forward", "F micro-batch 0", Action("F", 0)):
        traffic.sent += 7
    with recorder.span("optimizer", "optimizer step"):
        assert not waited, "nothing waits within the step"
    first, second = recorder.take()
    assert waited == [4] and not recorder.recording and recorder.take() == []
    assert (first.start, first.end, first.counts, first.action) == (0.005, 0.010, {"sent": 7}, Action("F", 0))
    assert (second.start, second.end, second.counts, second.action) == (0.015, 0.020, {}, None)
