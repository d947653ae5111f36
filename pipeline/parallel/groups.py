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

LINK_CTAS = 4
"""Thread blocks of a NCCL kernel that sends or receives hidden states: enough for an NVLink, few of a GPU's 132."""


@dataclass(frozen=True)
class Groups:
    """The communicators one rank takes part in."""

    data: Any
    """Ranks that hold the same stage."""
    p2p_groups: Mapping[tuple[int, int], Any]
    """(from stage, to stage) -> the group of the two ranks of this dp rank's pipeline, for neighbouring stages.

    NCCL runs the operations of a communicator in order, on one stream. A receive posted ahead of its message would
    block everything behind it: a send in the other direction, which the message may depend on, or a message from
    another rank. So each ordered pair of ranks has its own communicator, in which one rank only sends and the other
    only receives, in the same order.
    """
    self_group: Any
    """This rank alone: the model-parallel group, as far as DeepSpeed is concerned."""
    embedding_group: Any
    """First and last stage of this pipeline (tied embeddings); None with one stage and on stages in between."""


def create_groups(topology: Topology, timeout_s: int = 1800, *, ring: bool = True) -> Groups:
    """Create every group of the grid on every rank in the same order, as torch requires; return this rank's own.

    Args:
        topology: Place of this rank.
        timeout_s: Timeout of collectives in seconds.
        ring: Connect the last stage to the first, too: needed with several virtual stages a stage.
    """
    # A new group does not inherit the world's timeout; the backend's default is 10 minutes on NCCL.
    new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout_s))
    data = [new_group(topology.stage_ranks(stage)) for stage in range(topology.pp)]
    p2p_groups = _create_p2p_groups(topology, partial(new_group, pg_options=link_options()), ring)
    self_group = new_group([topology.rank], use_local_synchronization=True)  # created on this rank only
    embedding_group = None
    if topology.pp > 1:
        pairs = [[topology.rank_of(0, r), topology.rank_of(topology.pp - 1, r)] for r in range(topology.dp)]
        embedding_groups = [new_group(pair) for pair in pairs]
        embedding_group = embedding_groups[topology.dp_rank] if topology.first or topology.last else None
    return Groups(data[topology.stage], p2p_groups, self_group, embedding_group)


def link_options() -> Any:
    """Return NCCL's options for a link between two stages; None for other backends.

    A message must not wait behind the kernels of a gather, and needs few of the GPU's multiprocessors.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = LINK_CTAS
    return options


def _create_p2p_groups(
    topology: Topology, new_group: Callable[[list[int]], Any], ring: bool
) -> dict[tuple[int, int], Any]:
    """Create the groups of all neighbouring pairs; return those of this rank."""
    own = {}
    for dp_rank, (source, target) in itertools.product(range(topology.dp), neighbours(topology.pp, ring)):
        group = new_group([topology.rank_of(source, dp_rank), topology.rank_of(target, dp_rank)])
        if dp_rank == topology.dp_rank and topology.stage in (source, target):
            own[source, target] = group
    return own


def neighbours(stages: int, ring: bool) -> list[tuple[int, int]]:
    """Return the ordered pairs of stages that exchange messages: a line, or a ring with virtual stages."""
    line = {(stage, stage + 1) for stage in range(stages - 1)} | ({(stages - 1, 0)} if ring and stages > 1 else set())
    return sorted(line | {(after, before) for before, after in line})


def connect(topology: Topology, groups: Groups, device: torch.device) -> None:
    """Send one number in every group, in the same order on all ranks.

    NCCL connects two ranks at their first message and waits for both, so a receive posted ahead would wait for a send
    that cannot happen yet.
    """
    for source, target in sorted(groups.p2p_groups):
        number, group = torch.zeros(1, device=device), groups.p2p_groups[source, target]
        if topology.stage == source:
            dist.send(number, topology.rank_of(target, topology.dp_rank), group=group)
        else:
            dist.recv(number, topology.rank_of(source, topology.dp_rank), group=group)
