"""Processes and devices: variables set by launchers, the process group, a rank's share of its node."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data_prep.common.errors import UserError
from pipeline.config.schema import ConfigError

_LAUNCHERS: Mapping[
    str, Mapping[str, str]
] = {  # a variable that only this launcher sets -> its names for torch's variables
    "SLURM_STEP_NUM_TASKS": {  # set in a step of srun only: a batch script is one process, whatever --ntasks says
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    },
    "OMPI_COMM_WORLD_SIZE": {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    "PMI_SIZE": {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID"},
}


_SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
MAX_RANKS = 1 << 20


def fill_rank_variables() -> None:
    """Set torch's rank variables from the launcher, Slurm or MPI; else to those of a single process.

    Raises ConfigError where they make no sense, or where ranks on several nodes have no MASTER_ADDR.
    """
    launcher = next((names for mark, names in _LAUNCHERS.items() if mark in os.environ), {})
    for name, default in _SINGLE_PROCESS.items():
        os.environ.setdefault(name, os.environ.get(launcher.get(name, ""), default))
    _check_rank_variables()
    if "MASTER_ADDR" not in os.environ and _on_several_nodes():
        raise ConfigError("ranks on several nodes need MASTER_ADDR, the host of rank 0: export it (slurm/pt.sh does)")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:  # several ranks must agree on a port; a single process takes any free one
        os.environ["MASTER_PORT"] = "29500" if os.environ["WORLD_SIZE"] != "1" else str(free_port())


def _check_rank_variables() -> None:
    """Raise ConfigError unless 0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < WORLD_SIZE, all of them numbers."""
    values = {name: os.environ[name] for name in _SINGLE_PROCESS}
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
    numbers = {name: int(value) for name, value in values.items() if re.fullmatch(r"\d{1,7}", value, re.ASCII)}
    world = numbers.get("WORLD_SIZE", 0)
    if len(numbers) < len(values) or not (numbers["RANK"] < world <= MAX_RANKS and numbers["LOCAL_RANK"] < world):
        os.environ.pop("RANK")  # it names no rank: this process reports the error itself
        raise ConfigError(
            f"{shown} make no sense: ranks count from 0 to WORLD_SIZE - 1; let the launcher set them, or unset them"
        )


def _on_several_nodes() -> bool:
    """Whether the launcher reports several nodes; MPICH does not report nodes."""
    world = os.environ.get("OMPI_COMM_WORLD_SIZE")
    here = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", world)
    return here != world or int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def device_of_rank() -> torch.device:
    """Return this rank's GPU, or the CPU. Raises ConfigError when a node runs more ranks than it has GPUs.

    A task with a GPU of its own (``srun --gpus-per-task=1``) sees it as the first, whatever its local rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local and count == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["LOCAL_RANK"], local = "0", 0  # DeepSpeed reads its device index from it
    if local >= count:
        raise ConfigError(f"local rank {local} has no GPU of its own: start at most {count} ranks here")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def share_of_cores() -> int:
    """Return this rank's number of cores: those it is bound to, divided by the ranks bound to them. Collective."""
    places, rank = _cores_of_ranks(), dist.get_rank()
    host, cores = places[rank]
    sharers = sum(other == host and bool(cores & theirs) for other, theirs in places)
    return max(1, len(cores) // sharers)


def bind_cores() -> None:
    """Bind this rank to its share of the cores that its host's ranks have in common. Collective.

    Without it, the threads of one rank wander over the cores, away from its GPU and its memory. Ranks that a launcher
    has bound to cores of their own, and ranks that outnumber their cores, stay as they are.
    """
    places, rank = _cores_of_ranks(), dist.get_rank()
    cores = sorted(places[rank][1])
    sharers = [other for other, place in enumerate(places) if place == places[rank]]
    if 1 < len(sharers) <= len(cores):
        place, count = sharers.index(rank), len(sharers)
        os.sched_setaffinity(0, cores[place * len(cores) // count : (place + 1) * len(cores) // count])


def _cores_of_ranks() -> list[tuple[str, set[int]]]:
    """Return the host and the allowed cores of every rank. Collective."""
    places: list[tuple[str, set[int]]] = [("", set())] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), os.sched_getaffinity(0)))
    return places


def refuse_shared_gpu(store: Any, gpu: str) -> None:
    """Register a GPU in the job's ``store``. Raises UserError when another rank has registered it."""
    if store.add(f"gpu {gpu}", 1) > 1:
        raise UserError(f"two ranks share {gpu}: start one rank a GPU (as many --ntasks-per-node as --gpus-per-node)")


def start_processes(timeout_s: int) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs. Raises UserError when another job has the port."""
    import deepspeed

    # Keep DeepSpeed from compiling a shared-memory collective for CPUs, which gloo does not need.
    deepspeed.ops.__compatible_ops__ = {}
    backend, limit = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout_s)
    try:
        # DeepSpeed would bind the group to the device: NCCL would then connect the world at once and split it to
        # create every other group. Created here, the ranks of a group connect at its first message.
        dist.init_process_group(backend, timeout=limit)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} is in use by another job on this machine: use deepspeed --master_port OTHER ..."
        ) from error
    if torch.cuda.is_available():  # NCCL would only report "invalid usage"
        own = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        refuse_shared_gpu(dist.distributed_c10d._get_default_store(), f"GPU {own} of {socket.gethostname()}")
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=limit, verbose=False)


def set_determinism(deterministic: bool) -> None:
    """Let torch use deterministic kernels only, or any. Call it before the first matrix product on a GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is loaded
    torch.use_deterministic_algorithms(deterministic)


def stop_processes() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def configure_libraries() -> None:
    """Set DeepSpeed's accelerator explicitly and silence its warnings about calls that torch will rename.

    CUDA loads its kernels at the start, as NCCL's documentation advises: a kernel loaded at its first use waits for all
    running kernels, one of which may be a collective waiting for another rank. This costs some device memory.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read at the first use of CUDA, which is below
    # A step uses about ten streams; with CUDA's default of eight queues, two of them would wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
