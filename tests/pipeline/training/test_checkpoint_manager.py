"""Saves beside the steps, in one process: what a copy holds, who waits for whom, and how a failure is told."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_prep.common.errors import UserError
from pipeline.checkpoints import writing
from pipeline.checkpoints.checkpoint import checkpoint_folders, open_checkpoint, unfinished_folders
from pipeline.checkpoints.writing import DivergedError
from pipeline.config.schema import CheckpointConfig
from pipeline.parallel.topology import Topology
from pipeline.training import checkpoint_manager
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.run.folder import RunFolder
from pipeline.training.trainer import Trainer
from pipeline.watchdog.heartbeat import Heartbeat


class OneRank:
    """What a CheckpointManager asks of a stage, for a rank that holds all of two parameters."""

    def __init__(self) -> None:
        self.topology = Topology(1, 0, 1)
        self.module = nn.ParameterDict({"w": torch.zeros(4), "f": torch.ones(2)})
        self.module["f"].requires_grad_(False)
        self.states = {name: torch.zeros(4) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer_steps = 0

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "w", self.module["w"]

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "f", self.module["f"]

    def master_shard(self, param: nn.Parameter, state: str | None = None) -> torch.Tensor:
        return param.detach() if state is None else self.states[state]

    def compute_shard(self, param: nn.Parameter) -> torch.Tensor:
        return param.detach()

    def full_shape(self, param: nn.Parameter) -> torch.Size:
        return param.shape

    def train(self, value: float) -> None:
        """A step: everything is overwritten in place."""
        for tensor in (self.module["w"].data, *self.states.values()):
            tensor.fill_(value)


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.inside = threading.Event(), threading.Event()
        real = writing.save_file

        def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
            self.inside.set()
            assert self.open.wait(60)
            real(tensors, path)

        monkeypatch.setattr(writing, "save_file", slow)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def stage() -> OneRank:
    return OneRank()


@pytest.fixture
def saver(alone: None, stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointManager:
    return make_saver(stage, tmp_path, monkeypatch)


def make_saver(stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **checkpoint: Any) -> CheckpointManager:
    monkeypatch.setattr(checkpoint_manager, "describe_model", lambda plan: {"spec": {"llm": {}}})
    (tmp_path / "tokenizer").mkdir(parents=True, exist_ok=True)
    (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"pieces")
    config = SimpleNamespace(checkpoint=CheckpointConfig(every_steps=1, **checkpoint), model_dump=lambda: {})
    packs = SimpleNamespace(directory=tmp_path, manifest=SimpleNamespace(tokenizer="tokenizer", plan_sha256="0"))
    plan = SimpleNamespace(
        config=config, packs=packs, topology=stage.topology, order=SimpleNamespace(global_batch_size=4)
    )
    folder = RunFolder(str(tmp_path / "run"))
    folder.create()
    return CheckpointManager(cast(Any, plan), folder, cast(Any, stage), step=0)


def saved(run_dir: Path) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in open_checkpoint(run_dir).parameters()}


def test_a_copy_holds_the_moment_it_was_taken_whatever_is_trained_meanwhile(
    saver: CheckpointManager, stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    stage.train(1.0)
    saver.save(1)
    assert gate.inside.wait(60) and saver.pending == 1
    stage.train(2.0)
    saver.advance(saver.pending)
    assert checkpoint_folders(tmp_path / "run") == [], "not before it is written"
    gate.open.set()
    saver.finish()
    assert saver.pending == 0
    assert saved(tmp_path / "run") == {"w": [1.0] * 4, "f": [1.0] * 2}
    assert open_checkpoint(tmp_path / "run").faults() == []
    state = open_checkpoint(tmp_path / "run").read_flat("exp_avg", "w", 0, 4)
    assert state.tolist() == [1.0] * 4


def test_a_save_that_is_due_waits_for_the_one_under_way(
    saver: CheckpointManager, stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    stage.train(1.0)
    saver.save(1)
    memory = {key: copy.data_ptr() for key, copy in saver._host._copies.items()}  # type: ignore[union-attr]
    assert gate.inside.wait(60)
    stage.train(2.0)
    threading.Timer(0.2, gate.open.set).start()
    saver.save(2)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step-00000001"]
    assert saved(tmp_path / "run")["w"] == [1.0] * 4
    saver.finish()
    assert saved(tmp_path / "run")["w"] == [2.0] * 4
    assert {key: copy.data_ptr() for key, copy in saver._host._copies.items()} == memory, "one copy, ever"  # type: ignore[union-attr]


def test_ranks_go_on_only_when_all_have_written_and_at_once_when_one_has_failed(
    saver: CheckpointManager, stage: OneRank, tmp_path: Path
) -> None:
    saver.save(1)
    saver._phase.result()
    assert saver.pending == 0, "this rank is done, but"
    saver.advance(1.0)
    assert checkpoint_folders(tmp_path / "run") == [], "another one writes"
    saver.advance(0.0)  # published from here on, by a thread
    saver._phase.result()
    saver.advance(0.0)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step-00000001"]
    assert json.loads((tmp_path / "run/status.json").read_text())["step"] == 1


def test_a_failure_is_told_at_the_next_step_and_nothing_is_left(
    saver: CheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    saver.save(1)
    with pytest.raises(OSError):
        saver._phase.result()
    assert saver.pending == math.inf
    with pytest.raises(UserError, match=r"step-00000001 cannot be written .*No space left on device"):
        saver.advance(saver.pending)
    assert not checkpoint_folders(tmp_path / "run") and not unfinished_folders(tmp_path / "run")


def test_both_ways_write_the_same_bytes_and_the_slow_one_is_done_at_once(
    saver: CheckpointManager, stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.train(3.0)
    saver.save(1)
    saver.finish()
    slow = make_saver(stage, tmp_path / "slow", monkeypatch, asynchronous=False)
    slow.save(1)
    assert slow.pending == 0
    for path in (tmp_path / "run").glob("checkpoints/*/*"):
        theirs = tmp_path / "slow" / path.relative_to(tmp_path)
        assert path.is_dir() or path.read_bytes() == theirs.read_bytes(), path


def test_what_waiting_cost_is_told_once(saver: CheckpointManager) -> None:
    assert saver.take_waited() == 0
    saver.save(1)
    saver.finish()
    assert saver.take_waited() > 0
    assert saver.take_waited() == 0


def test_a_step_that_is_saved_is_not_saved_again(saver: CheckpointManager, tmp_path: Path) -> None:
    saver.save(1)
    saver.finish()
    made = (tmp_path / "run/checkpoints/step-00000001").stat().st_ino
    saver.save(1)
    saver.finish()
    assert (tmp_path / "run/checkpoints/step-00000001").stat().st_ino == made


def test_a_run_that_ends_by_itself_finishes_the_save_in_progress(
    saver: CheckpointManager, stage: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(outcome: object) -> None:
        raise DivergedError("20 steps in a row had a non-finite loss")

    gate = Gate(monkeypatch)
    stage.train(1.0)
    saver.save(1)
    assert gate.inside.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    trainer = SimpleNamespace(
        _checkpoints=saver,
        _incidents=SimpleNamespace(check=too_many),
        _heartbeat=Heartbeat(),
        _diverged=lambda error: error,
    )
    with pytest.raises(UserError, match="20 steps in a row"):
        Trainer._check(cast(Any, trainer), cast(Any, None))
    assert saved(tmp_path / "run")["w"] == [1.0] * 4
