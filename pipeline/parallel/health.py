"""Checks that a machine can train: its GPUs, its disk, and the network between processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

MIN_FREE_GIB = 1.0
MIN_FREE_TEMPORARY_GIB = 0.05
"""Temporary files are few and small, and on diskless nodes they occupy memory."""
PATIENCE = timedelta(seconds=60)


def gpu_problem(index: int) -> Iterator[str]:
    """Yield what is wrong with one GPU, by a matrix product with a known result."""
    try:
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        if not bool((ones @ ones == 256).all()):
            yield f"GPU {index} computes wrong numbers: take it out of service"
    except RuntimeError as error:
        yield f"GPU {index}: {str(error).splitlines()[0]}"


def disk_problem(folder: Path, need_gib: float | None = None) -> Iterator[str]:
    """Yield why this process cannot write ``need_gib`` to an existing folder.

    None = 1 GiB, or 0.05 GiB in the folder of temporary files.
    """
    if need_gib is None:
        need_gib = MIN_FREE_TEMPORARY_GIB if folder == Path(tempfile.gettempdir()) else MIN_FREE_GIB
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"fit")
        probe.unlink()
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror}): name another folder"
        return
    free = shutil.disk_usage(folder).free / 2**30
    if free < need_gib:
        yield f"{folder} has {free:.2f} GiB free, {need_gib:.2f} GiB are needed: free some space"


def network_problem(rank: int, world: int, *, backend: str, store: Store | None = None) -> str:
    """All-reduce over all processes that meet at MASTER_ADDR, or in a store; return the problem, or an empty string.

    The process group stays open for further checks.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if backend == "nccl" else torch.device("cpu")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        value = torch.full((1 << 20,), float(rank + 1), device=device)
        dist.all_reduce(value)
        wrong = bool((value != world * (world + 1) / 2).any())
    except (RuntimeError, ValueError) as error:
        return f"no all-reduce of {world} processes over {backend} at {place}: {str(error).splitlines()[0]}"
    return f"an all-reduce over {backend} gave a wrong sum" if wrong else ""
