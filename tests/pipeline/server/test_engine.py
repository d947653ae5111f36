"""The engine without HTTP: who joins when, what ends early, what a failure costs."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from data_prep.common.errors import UserError
from pipeline.server.engine import UNHEALTHY_FAILURES, Busy, Engine, Event, Failed, Finished, Stopping, Ticket, Work
from pipeline.server.sampling import Choice, Sampling
from pipeline.serving.model import MultimodalModel, load_model
from pipeline.serving.steps import StepModel
from tests.pipeline.server.helpers import eventually, make_model
from tests.pipeline.serving.helpers import CONVERSATIONS

NEW = (9, 40, 3, 17)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalModel:
    return load_model(make_model(tmp_path_factory.mktemp("engine")))


@contextmanager
def running(model: MultimodalModel, **options: Any) -> Iterator[Engine]:
    engine = Engine(StepModel(model), **options)
    try:
        yield engine
    finally:
        engine.close()
        assert not engine._thread.is_alive()


@dataclass
class Asked:
    """One request and its events."""

    ticket: Ticket
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def outcome(self) -> tuple[list[int], Finished | Failed]:
        ids = []
        while isinstance(event := self.events.get(timeout=60), Choice):
            ids.append(event.id)
        return ids, event


def ask(engine: Engine, number: int, new: int, *, endless: bool = True, sampling: Sampling | None = None) -> Asked:
    model = engine.steps.model
    prepared = engine.steps.prepare(model.prompt(CONVERSATIONS[number]), new)
    asked = Asked(engine.reserve())
    ends = frozenset(model.export_config.eos_ids) if endless else frozenset()
    engine.submit(asked.ticket, Work(prepared, new, sampling or Sampling(), ends), asked.events.put)
    return asked


@pytest.mark.parametrize("cache_tokens", [None, 90])
def test_a_batch_answers_like_generate(model: MultimodalModel, cache_tokens: int | None) -> None:
    with running(model, batch=3, cache_tokens=cache_tokens) as engine:
        asked = [ask(engine, number, new) for number, new in enumerate(NEW)]
        outcomes = [one.outcome() for one in asked]
        for one in asked:
            engine.release(one.ticket)
        eventually(lambda: engine.idle and engine.running == 0 and engine.cached_tokens == 0)
    for number, (ids, end) in enumerate(outcomes):
        prompt = model.prompt(CONVERSATIONS[number])
        wanted = model.generate_ids([prompt], max_new_tokens=NEW[number], eos_token_id=None)[0].tolist()
        assert (ids, end) == (wanted, Finished("length"))


def test_an_end_token_ends_the_answer(model: MultimodalModel) -> None:
    with running(model) as engine:
        ids, _ = ask(engine, 1, 12).outcome()
        engine._ends = frozenset([ids[5]])
        first = ids.index(ids[5])
        assert ask(engine, 1, 12, endless=False).outcome() == (ids[: first + 1], Finished("stop"))
        engine._ends = frozenset([ids[0]])
        assert ask(engine, 1, 12, endless=False).outcome() == (ids[:1], Finished("stop"))


def test_places_are_limited_and_come_back(model: MultimodalModel) -> None:
    with running(model, batch=1, queue=1) as engine:
        first, second = engine.reserve(), engine.reserve()
        with pytest.raises(Busy) as busy:
            engine.reserve()
        assert busy.value.retry_after_s >= 1
        engine.release(first)
        engine.release(engine.reserve())
        engine.stop()
        with pytest.raises(Stopping):
            engine.reserve()
        assert not engine.idle
        engine.release(second)
        assert engine.idle


def test_a_cancelled_request_leaves_at_once(model: MultimodalModel) -> None:
    with running(model, batch=1) as engine:
        long, waiting = ask(engine, 0, 8000), ask(engine, 1, 8000)
        long.events.get(timeout=60)
        engine.cancel(waiting.ticket)
        assert waiting.outcome() == ([], Finished("cancelled"))
        engine.release(long.ticket)
        ids, end = long.outcome()
        assert end == Finished("cancelled") and len(ids) < 7900
        assert ask(engine, 2, 2).outcome()[1] == Finished("length")


def test_closing_cancels_everything(model: MultimodalModel) -> None:
    with running(model, batch=1) as engine:
        asked = [ask(engine, number, 8000) for number in (0, 1)]
        asked[0].events.get(timeout=60)
    assert [one.outcome()[1] for one in asked] == [Finished("cancelled")] * 2


def test_a_request_beyond_the_cache_is_refused(model: MultimodalModel) -> None:
    with running(model, cache_tokens=60) as engine, pytest.raises(UserError, match="this server's cache of 60"):
        ask(engine, 0, 40)


def test_a_failing_step_costs_only_the_requests_in_it(
    model: MultimodalModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(model) as engine:
        real = engine.steps.decode
        calls: list[int] = []

        def failing(*arguments: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("no memory")
            return real(*arguments)

        monkeypatch.setattr(engine.steps, "decode", failing)
        ids, end = ask(engine, 1, 9).outcome()
        assert len(ids) == 3 and isinstance(end, Failed) and not end.user and "--cache-tokens" in end.message
        again, _ = ask(engine, 1, 9).outcome()
        assert again[:3] == ids and len(again) == 9
        assert engine.health == "ok"
    assert "decoding step of 1 requests failed" in caplog.text


def test_a_failing_prefill_costs_only_its_request(model: MultimodalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model) as engine:
        long = ask(engine, 0, 300)
        long.events.get(timeout=60)
        monkeypatch.setattr(engine.steps, "prefill", lambda _: 1 / 0)
        _, end = ask(engine, 1, 9).outcome()
        assert isinstance(end, Failed) and "ZeroDivisionError" in end.message
        engine.cancel(long.ticket)
        long.outcome()
        assert engine.health == "ok"
        for _ in range(UNHEALTHY_FAILURES):
            ask(engine, 1, 9).outcome()
        assert engine.health == "failing"
        monkeypatch.undo()
        ask(engine, 1, 9).outcome()
        assert engine.health == "ok"


def test_the_others_go_on_when_a_prefill_fails(model: MultimodalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model) as engine:
        long = ask(engine, 0, 100)
        long.events.get(timeout=60)
        monkeypatch.setattr(engine.steps, "prefill", lambda _: 1 / 0)
        ask(engine, 1, 9).outcome()
        assert long.outcome()[1] == Finished("length")


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(model: MultimodalModel) -> None:
    sampling = Sampling(1.0, 0.95, seed=7)
    with running(model) as engine:
        alone, _ = ask(engine, 1, 30, sampling=sampling).outcome()
        other = ask(engine, 0, 200, sampling=Sampling(1.0))
        assert ask(engine, 1, 30, sampling=sampling).outcome()[0] == alone
        other.outcome()
        greedy, _ = ask(engine, 1, 30).outcome()
    assert alone != greedy
