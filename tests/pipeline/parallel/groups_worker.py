"""One rank of `test_groups`: waits in each group of a 2 x 2 grid for a rank that never comes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes
from pipeline.parallel.topology import Topology

LIMIT_S = 2


def gives_up(group: Any) -> bool:
    """Whether a collective that nobody else of the group joins ends with an error."""
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        return True
    return False


def main() -> None:
    fill_rank_variables()
    start_processes(1800)
    topology = Topology(dist.get_world_size(), dist.get_rank(), 2)
    groups = create_groups(topology, LIMIT_S)
    tried = {
        "data": groups.data,
        "embedding_group": groups.embedding_group,
        **{f"link {link}": group for link, group in groups.p2p_groups.items()},
    }
    # In each group the first rank waits and the second stays away.
    waits = {name: group for name, group in tried.items() if dist.get_rank(group) == 0}
    print(f"rank {topology.rank} gave up in {sum(gives_up(group) for group in waits.values())} groups", flush=True)
    dist.barrier()  # the sockets stay open until all have given up: a closed one would end a wait sooner
    os._exit(0)  # the broken groups are left as they are


if __name__ == "__main__":
    main()
