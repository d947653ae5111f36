"""A start that needs more memory than there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.config.flags import parse
from pipeline.planning import capacity
from pipeline.planning.capacity import CUDA_BYTES, check_memory, host_memory, local_ranks, memory_problems
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.run_plan import RunPlan
from tests.pipeline.training.runs import flags


def plan_of(demo: Path, run_dir: Path, *more: str, rank: int = 0) -> RunPlan:
    return RunPlan.build(parse(flags(demo, run_dir, *more)), rank=rank, world=4)


def test_figures_of_a_gpu_and_of_a_host(small_demo: Path, tmp_path: Path) -> None:
    plan = plan_of(small_demo, tmp_path, "--parallel.pp", "2", rank=3)
    needs = [WorkloadEstimate.of(plan).memory(stage).total for stage in (0, 1)]
    gpu_needs = needs[1] + CUDA_BYTES
    copies = [12 * plan.split.parameters(stage)[0] / 2 for stage in (0, 1)]
    assert memory_problems(plan, gpu_bytes=gpu_needs, host_bytes=sum(copies), local_ranks=2) == []
    (gpu,) = memory_problems(plan, gpu_bytes=gpu_needs - 1, host_bytes=GIB, local_ranks=2)
    assert "a rank of stage 1 needs about" in gpu
    exactly = 2 * (needs[1] + copies[1])
    assert memory_problems(plan, gpu_bytes=None, host_bytes=exactly, local_ranks=2) == []
    (host,) = memory_problems(plan, gpu_bytes=None, host_bytes=exactly - 1, local_ranks=2)
    assert "the 2 ranks of a host need about" in host
    (host,) = memory_problems(plan, gpu_bytes=None, host_bytes=exactly, local_ranks=4)
    assert "the 4 ranks of a host need about" in host


def test_a_start_that_cannot_fit_is_refused_or_recorded(
    small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "host_memory", lambda: 1024.0)
    with pytest.raises(UserError, match=r"need about .* GiB of its memory, it has 0.0 GiB: .*allow-oversubscription"):
        check_memory(plan_of(small_demo, tmp_path))
    assert len(check_memory(plan_of(small_demo, tmp_path, "--parallel.allow-oversubscription", "true"))) == 1


def test_memory_of_this_host_and_ranks_of_launchers() -> None:
    assert 0 < host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert local_ranks({}, 8) == 8 == local_ranks({"LOCAL_SIZE": "x"}, 8)
    assert local_ranks({"LOCAL_SIZE": "2"}, 8) == 2 == local_ranks({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, 8)
    assert local_ranks({"LOCAL_WORLD_SIZE": "16"}, 8) == 8
