"""Stages under ZeRO-3 on two ranks, one of them without images: a step equals an unsharded one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.model.stage import Stage
from tests.launch import ROOT, run
from tests.pipeline.model.helpers import whole_stage
from tests.pipeline.model.zero3_worker import CASES, TARGETS, micro_batches, spec_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero3")
    script = ROOT / "tests/pipeline/model/zero3_worker.py"
    run(2, script, str(out), env={"PYTHONPATH": str(ROOT)}, timeout_s=240, launcher="srun").check()
    return out


def plain_step(name: str) -> tuple[Stage, float]:
    """Take the same step in one process."""
    stage, total = whole_stage(spec_of(name)), 0.0
    for rank in range(2):
        for inputs in micro_batches(rank):
            loss = stage(None, inputs)
            (loss / TARGETS).backward()
            total += loss.item()
    with torch.no_grad():
        for param in stage.parameters():
            if param.requires_grad:
                assert param.grad is not None
                param -= param.grad
    return stage, total


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_step_equals_a_plain_one(name: str, shards: Path) -> None:
    stage, total = plain_step(name)
    ranks = [torch.load(shards / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(float(rank["loss"]) for rank in ranks) == pytest.approx(total, rel=1e-6)
    wanted = {key: param for key, param in stage.named_parameters() if param.requires_grad}
    assert ranks[0]["shards"].keys() == wanted.keys()
    for key, param in wanted.items():
        whole = torch.cat([rank["shards"][key] for rank in ranks])[: param.numel()].view(param.shape)
        assert (whole - param).abs().max() <= 2e-5, key
