"""What would make the host wait for a GPU, counted on a CPU with an accelerator that pretends to be asynchronous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from data_prep.packs import PackReader
from pipeline.data.batches import pinned, stage_inputs
from pipeline.masks import get_policy
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.train import main
from tests.pipeline.training.runs import flags, metrics


@pytest.mark.slow
def test_the_host_waits_for_nothing_within_a_step(
    small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first forward to the last backward; DeepSpeed's throughput timer would wait from the third step on."""
    waits: list[bool] = []
    open_steps: list[None] = []
    accumulate = Zero3Stage.accumulate

    @contextmanager
    def watched(stage: Zero3Stage) -> Iterator[None]:
        open_steps.append(None)
        with accumulate(stage):
            yield
        open_steps.pop()

    accelerator = type(get_accelerator())
    monkeypatch.setattr(Zero3Stage, "accumulate", watched)
    monkeypatch.setattr(accelerator, "synchronize", lambda self, device=None: waits.append(bool(open_steps)))
    run = tmp_path / "run"
    assert main(flags(small_demo, run, "--parallel.micro-batches", "4")) == 0
    assert len(metrics(run)) == 6
    assert waits.count(True) == 0
    assert len(waits) <= 6 * 2, "the update of a step: its gradient norm"


def test_all_tensors_of_a_micro_batch_are_pinned(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory would make the host wait, once per micro-batch and stage."""
    packs = PackReader(small_demo / "packs/sft")
    inputs = stage_inputs([packs[0], packs[1]], get_policy("mma"), torch.zeros(2, 3, 4, 4))
    locked: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = list(tensors(pinned(inputs)))
    assert len(found) > 10
    assert {tensor.data_ptr() for tensor in found} <= {tensor.data_ptr() for tensor in locked}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that are copied to the device."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "run_split"):
        yield from tensors(value.run_split)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))
