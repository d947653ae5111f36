"""Refuses a start whose estimated memory exceeds that of the GPU or the host."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.config.schema import ConfigError
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.run_plan import RunPlan

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
CUDA_BYTES = 1.5 * GIB
"""Allowance for CUDA's context, its kernels, which are all loaded at the start, and NCCL's buffers on a GPU."""
_USED = 0.85
"""Share of a rank's memory that ``gradient_checkpointing: auto`` fills by estimate; the rest is for its error."""
_SAVED_BYTES = 12
"""Host memory of asynchronous saves per trained parameter of a rank."""


def memory_problems(plan: RunPlan, *, gpu_bytes: float | None, host_bytes: float, local_ranks: int) -> list[str]:
    """Return how a plan exceeds the memory of this rank's GPU or of its host.

    Args:
        plan: The run, on this rank.
        gpu_bytes: Memory of its GPU; None on CPUs.
        host_bytes: Memory of the host, shared by its ranks.
        local_ranks: Number of ranks on the host.
    """
    topology, load = plan.topology, WorkloadEstimate.of(plan)
    problems = []
    if gpu_bytes is not None and (need := load.memory(topology.stage).total + CUDA_BYTES) > gpu_bytes:
        problems.append(
            f"a rank of stage {topology.stage} needs about {need / GIB:.1f} GiB of GPU memory, "
            f"the GPU has {gpu_bytes / GIB:.1f} GiB"
        )
    first = topology.rank - topology.rank % local_ranks
    ranks = range(first, min(first + local_ranks, topology.world))
    need = sum(_host_bytes(plan, load, rank // topology.dp, on_gpu=gpu_bytes is not None) for rank in ranks)
    if need > host_bytes:
        problems.append(
            f"the {len(ranks)} ranks of a host need about {need / GIB:.1f} GiB of its memory, "
            f"it has {host_bytes / GIB:.1f} GiB"
        )
    return problems


def check_memory(plan: RunPlan) -> list[str]:
    """Return the problems that ``parallel.allow_oversubscription`` accepts. Raises ConfigError if it does not."""
    problems = memory_problems(
        plan, gpu_bytes=gpu_memory(), host_bytes=host_memory(), local_ranks=local_ranks(os.environ, plan.topology.world)
    )
    if problems and not plan.config.parallel.allow_oversubscription:
        raise ConfigError(
            f"{'; '.join(problems)}: use more ranks, parallel.pp, offload (ds_configs/zero3_offload.json) or smaller "
            "micro-batches; --parallel.allow-oversubscription true starts anyway"
        )
    return problems


def gpu_memory() -> float | None:
    """Return the bytes of this rank's GPU; None on CPUs."""
    if not torch.cuda.is_available():
        return None
    local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return float(torch.cuda.get_device_properties(local).total_memory)


def recomputed_layers(plan: RunPlan) -> int:
    """Return k where this rank recomputes every k-th decoder layer, 0 = none; ``auto`` goes by its device's memory."""
    train, topology = plan.config.train, plan.topology
    if train.gradient_checkpointing != "auto":
        return train.recomputed_layers
    gpu = gpu_memory()
    own = host_memory() / local_ranks(os.environ, topology.world) if gpu is None else gpu - CUDA_BYTES
    return WorkloadEstimate.of(plan).recomputation_for(topology.stage, _USED * own)


def _host_bytes(plan: RunPlan, load: WorkloadEstimate, stage: int, *, on_gpu: bool) -> float:
    memory, (trained, _) = load.memory(stage), plan.split.parameters(stage)
    copy = _SAVED_BYTES * trained / plan.topology.dp if plan.config.checkpoint.asynchronous else 0.0
    return memory.host + copy + (0.0 if on_gpu else memory.total)


def host_memory() -> float:
    """Return the bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            total = min(total, float(text))
    return total


def local_ranks(variables: Mapping[str, str], world: int) -> int:
    """Return the number of ranks on this host, from the launcher; all of them if no launcher tells.

    ``SLURM_STEP_TASKS_PER_NODE`` may be ``4(x2),3``: the first node counts for all.
    """
    for name in _LOCAL_RANKS:
        if found := re.match(r"[1-9]\d{0,6}", variables.get(name, "")):
            return min(int(found[0]), world)
    return world
