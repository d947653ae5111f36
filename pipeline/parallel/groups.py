"""Process start-up and the process groups of the grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pipeline.parallel.topology import Topology


@dataclass(frozen=True)
class Groups:
    """The communicators one rank takes part in."""

    data: Any
    """Ranks that hold the same stage."""
    p2p_groups: Mapping[tuple[int, int], Any]
    """(from stage, to stage) -> the group of these two ranks of this replica, for neighbours on the line of stages.

    NCCL runs what is asked of a communicator one after the other on one stream. A receive that was posted ahead of its
    message would hold up whatever came behind it: a send the other way, which the message may be waiting for, or a
    message from another rank. So each ordered pair of ranks has a communicator of its own: one rank only ever sends
    in it, the other only ever receives, in the same order.
    """
    self_group: Any
    """This rank alone: what DeepSpeed is told is the model-parallel group."""
    ends: Any
    """First and last stage of this replica (tied embeddings); None with one stage or in between."""


def create_groups(topology: Topology, timeout_s: int = 1800, *, ring: bool = True) -> Groups:
    """Create every group of the grid on every rank in the same order, as torch requires; return this rank's own.

    Args:
        topology: Place of this rank.
        timeout_s: Seconds after which a collective gives up.
        ring: Whether a stage may hold several chunks: the last stage and the first then have links, too.
    """
    # A new group does not take the world's limit over: left out, it would be the backend's (10 minutes on NCCL).
    new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout_s))
    data = [new_group(topology.stage_ranks(stage)) for stage in range(topology.pp)]
    p2p_groups = _create_p2p_groups(topology, new_group, ring)
    self_group = new_group([topology.rank], use_local_synchronization=True)  # on no other rank
    ends = None
    if topology.pp > 1:
        pairs = [[topology.rank_of(0, r), topology.rank_of(topology.pp - 1, r)] for r in range(topology.dp)]
        made = [new_group(pair) for pair in pairs]
        ends = made[topology.dp_rank] if topology.first or topology.last else None
    return Groups(data[topology.stage], p2p_groups, self_group, ends)


def _create_p2p_groups(
    topology: Topology, new_group: Callable[[list[int]], Any], ring: bool
) -> dict[tuple[int, int], Any]:
    """Create the links of all replicas; return those of this rank."""
    own = {}
    for dp_rank, (source, target) in itertools.product(range(topology.dp), neighbours(topology.pp, ring)):
        group = new_group([topology.rank_of(source, dp_rank), topology.rank_of(target, dp_rank)])
        if dp_rank == topology.dp_rank and topology.stage in (source, target):
            own[source, target] = group
    return own


def neighbours(stages: int, ring: bool) -> list[tuple[int, int]]:
    """Return the ordered pairs of stages that exchange messages: a line, with chunks a ring."""
    line = {(stage, stage + 1) for stage in range(stages - 1)} | ({(stages - 1, 0)} if ring and stages > 1 else set())
    return sorted(line | {(after, before) for before, after in line})


def connect(topology: Topology, groups: Groups, device: torch.device) -> None:
    """Send one number over every link, in one order on all ranks.

    NCCL connects two ranks at the first message between them and waits for both: a receive posted ahead would wait
    for a send that cannot come yet.
    """
    for source, target in sorted(groups.p2p_groups):
        number, group = torch.zeros(1, device=device), groups.p2p_groups[source, target]
        if topology.stage == source:
            dist.send(number, topology.rank_of(target, topology.dp_rank), group=group)
        else:
            dist.recv(number, topology.rank_of(source, topology.dp_rank), group=group)
