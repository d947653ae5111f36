"""Tests the nodes of a job: ``srun --ntasks-per-node=1 python slurm/check_nodes.py RUN_DIR GPUS``.

One process per node checks its GPUs, disks and the run folder. Then all nodes run an all-reduce over the network that
training will use. Rank 0 prints one line for each bad node, by name; the exit code is 3 if there is one.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipeline.parallel.health import PATIENCE, disk_problem, gpu_problem, network_problem

BAD_NODE = 3
"""Exit code; not 1, which a broken Python installation exits with."""


def main() -> int:
    """Check this node, then the network between all; return the exit code."""
    run_dir, gpus = Path(sys.argv[1]), int(sys.argv[2])
    rank, nodes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problem = "; ".join(own_problems(run_dir, gpus))
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(master, port, nodes, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False)
    store.set(f"name/{rank}", name)
    store.set(f"GPUs and disks/{rank}", problem or "ok")
    if not (report(store, nodes, "GPUs and disks") if rank == 0 else all_ok(store, "GPUs and disks")):
        return BAD_NODE
    store.set(f"network/{rank}", all_reduce_problem(store, rank, nodes) or "ok")
    return 0 if (report(store, nodes, "network") if rank == 0 else all_ok(store, "network")) else BAD_NODE


def own_problems(run_dir: Path, gpus: int) -> Iterator[str]:
    """Yield the problems of this node alone."""
    given = visible_gpus()
    if gpus and given is not None and given != gpus:
        yield f"the job has {gpus} GPUs on the first node, but {given} on this one"
    seen = torch.cuda.device_count()
    if gpus and torch.version.cuda and seen != gpus:
        yield f"the job has {gpus} GPUs per node, but torch sees {seen}"
    for index in range(seen):
        yield from gpu_problem(index)
    for folder in (run_dir, Path(tempfile.gettempdir())):
        yield from disk_problem(folder)


def visible_gpus() -> int | None:
    """Return the number of GPUs that Slurm allocated on this node, working or not; None if unknown."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else len([name for name in names.split(",") if name])


def all_reduce_problem(store: Store, rank: int, nodes: int) -> str:
    """All-reduce over all nodes with the backend of training; return the problem, or an empty string."""
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        return network_problem(rank, nodes, backend=backend, store=PrefixStore("reduce", store))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report(store: Store, nodes: int, test: str) -> bool:
    """Rank 0: collect every node's result, print the bad nodes, and publish whether all passed."""
    bad = []
    for rank in range(nodes):
        try:
            store.wait([f"{test}/{rank}"], PATIENCE * 2)
            answer = store.get(f"{test}/{rank}").decode()
        except RuntimeError:
            answer = "does not respond"
        if answer != "ok":
            bad.append(f"bad node {node_name(store, rank)}: {answer}")
    print("\n".join(bad or [f"{test}: {nodes} nodes passed"]), flush=True)
    store.set(f"result/{test}", "bad" if bad else "ok")
    read = [f"read/{test}/{rank}" for rank in range(1, nodes) if store.check([f"{test}/{rank}"])]
    with suppress(RuntimeError):  # the store ends with this process, so wait until all nodes have read the result
        store.wait(read, PATIENCE)
    return not bad


def node_name(store: Store, rank: int) -> str:
    """Return the name that a node published, or its number in the job if it never did."""
    key = f"name/{rank}"
    return store.get(key).decode() if store.check([key]) else f"number {rank} of {os.environ['SLURM_JOB_NODELIST']}"


def all_ok(store: Store, test: str) -> bool:
    """Other ranks: wait for the result of rank 0, and return it."""
    store.wait([f"result/{test}"], PATIENCE * 4)
    result = store.get(f"result/{test}")
    store.set(f"read/{test}/{os.environ['SLURM_PROCID']}", "")
    return result == b"ok"


if __name__ == "__main__":
    sys.exit(main())
