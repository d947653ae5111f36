"""Process start-up and the process groups of the grid."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.config import ConfigError
from pipeline.parallel.topology import Topology

_LAUNCHERS: Mapping[
    str, Mapping[str, str]
] = {  # the variable only this launcher's tasks have -> the ranks' names in it
    "SLURM_STEP_NUM_TASKS": {  # a step of srun; a batch script by itself is one process, whatever --ntasks says
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
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def fill_rank_variables() -> None:
    """Give torch's rank variables their values: from the launcher, Slurm or MPI, else a single process.

    Raises ConfigError where ranks on several nodes are not told where they are to meet.
    """
    launcher = next((names for mark, names in _LAUNCHERS.items() if mark in os.environ), {})
    for name, alone in _ALONE.items():
        os.environ.setdefault(name, os.environ.get(launcher.get(name, ""), alone))
    if "MASTER_ADDR" not in os.environ and _on_several_nodes():
        raise ConfigError("ranks on several nodes need MASTER_ADDR, the host of rank 0: export it (slurm/pt.sh does)")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:  # several ranks must agree on one; a single process takes any free one
        os.environ["MASTER_PORT"] = "29500" if os.environ["WORLD_SIZE"] != "1" else str(free_port())


def _on_several_nodes() -> bool:
    """Whether the launcher says so; MPICH does not say."""
    world = os.environ.get("OMPI_COMM_WORLD_SIZE")
    here = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", world)
    return here != world or int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Groups:
    """The communicators one rank takes part in."""

    data: Any
    """Ranks that hold the same stage."""
    links: Mapping[tuple[int, int], Any]
    """(from stage, to stage) -> the group of these two ranks of this replica, for neighbours on the line of stages.

    NCCL runs what is asked of a communicator one after the other on one stream. A receive that was posted ahead of its
    message would hold up whatever came behind it: a send the other way, which the message may be waiting for, or a
    message from another rank. So each ordered pair of ranks has a communicator of its own: one rank only ever sends
    in it, the other only ever receives, in the same order.
    """
    solo: Any
    """This rank alone: what DeepSpeed is told is the model-parallel group."""
    ends: Any
    """First and last stage of this replica (tied embeddings); None with one stage or in between."""


def create_groups(topology: Topology, timeout_s: int = 1800, *, chunked: bool = True) -> Groups:
    """Create every group of the grid on every rank in the same order, as torch requires; return this rank's own.

    Args:
        topology: Place of this rank.
        timeout_s: Seconds after which a collective gives up.
        chunked: Whether a stage may hold several chunks: the last stage and the first then have links, too.
    """
    # A new group does not take the world's limit over: left out, it would be the backend's (10 minutes on NCCL).
    new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout_s))
    data = [new_group(topology.stage_ranks(stage)) for stage in range(topology.pp)]
    links = _create_links(topology, new_group, chunked)
    solo = new_group([topology.rank], use_local_synchronization=True)  # on no other rank
    ends = None
    if topology.pp > 1:
        pairs = [[topology.rank_of(0, r), topology.rank_of(topology.pp - 1, r)] for r in range(topology.dp)]
        made = [new_group(pair) for pair in pairs]
        ends = made[topology.replica] if topology.first or topology.last else None
    return Groups(data[topology.stage], links, solo, ends)


def _create_links(
    topology: Topology, new_group: Callable[[list[int]], Any], chunked: bool
) -> dict[tuple[int, int], Any]:
    """Create the links of all replicas; return those of this rank."""
    own = {}
    for replica, (source, target) in itertools.product(range(topology.dp), neighbours(topology.pp, chunked)):
        group = new_group([topology.rank_of(source, replica), topology.rank_of(target, replica)])
        if replica == topology.replica and topology.stage in (source, target):
            own[source, target] = group
    return own


def neighbours(stages: int, chunked: bool) -> list[tuple[int, int]]:
    """Return the ordered pairs of stages that exchange messages: a line, with chunks a ring."""
    line = {(stage, stage + 1) for stage in range(stages - 1)} | (
        {(stages - 1, 0)} if chunked and stages > 1 else set()
    )
    return sorted(line | {(after, before) for before, after in line})


def connect(topology: Topology, groups: Groups, device: torch.device) -> None:
    """Send one number over every link, in one order on all ranks.

    NCCL connects two ranks at the first message between them and waits for both: a receive posted ahead would wait
    for a send that cannot come yet.
    """
    for source, target in sorted(groups.links):
        number, group = torch.zeros(1, device=device), groups.links[source, target]
        if topology.stage == source:
            dist.send(number, topology.rank_of(target, topology.replica), group=group)
        else:
            dist.recv(number, topology.rank_of(source, topology.replica), group=group)


def device_of_rank() -> torch.device:
    """Return this rank's GPU, or the CPU. Raises ConfigError when a node runs more ranks than it has GPUs.

    A task that was given one GPU of its own (``srun --gpus-per-task=1``) sees it as the first, whatever its local rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local and count == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["LOCAL_RANK"], local = "0", 0  # DeepSpeed takes the number of its device from it
    if local >= count:
        raise ConfigError(f"local rank {local} has no GPU of its own: start at most {count} ranks here")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def share_of_cores() -> int:
    """Return how many cores this rank can keep busy: those it is bound to, shared with the ranks bound to them too.

    Every rank must call this.
    """
    host, cores = socket.gethostname(), os.sched_getaffinity(0)
    places: list[tuple[str, set[int]]] = [("", set())] * dist.get_world_size()
    dist.all_gather_object(places, (host, cores))
    sharers = sum(other == host and bool(cores & theirs) for other, theirs in places)
    return max(1, len(cores) // sharers)


def refuse_shared_gpu(store: Any, gpu: str) -> None:
    """Raise UserError when another rank has said in the job's ``store`` that it uses the GPU of this name."""
    if store.add(f"gpu {gpu}", 1) > 1:
        raise UserError(
            f"two ranks share {gpu}: start one rank a GPU (srun --gpus-per-task=1, or fewer --ntasks-per-node)"
        )


def start_processes(timeout_s: int) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs. Raises UserError when another job has the port."""
    import deepspeed

    # DeepSpeed would try out its kernels with the host's compiler, to compile a shared-memory collective for CPUs:
    # gloo does without it.
    deepspeed.ops.__compatible_ops__ = {}
    backend, limit = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout_s)
    try:
        # Left to DeepSpeed, the group would be bound to the device: NCCL then connects the world at once, and makes
        # every other group by splitting it. Like this the ranks of a group connect at its first message.
        dist.init_process_group(backend, timeout=limit)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} is taken, by another job on this machine: deepspeed --master_port OTHER ..."
        ) from error
    if torch.cuda.is_available():  # as it connects, NCCL would only say "invalid usage"
        own = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        refuse_shared_gpu(dist.distributed_c10d._get_default_store(), f"GPU {own} of {socket.gethostname()}")
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=limit, verbose=False)


def stop_processes() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
