"""Writes one checkpoint from all ranks: every rank writes its shards, then rank 0 publishes the checkpoint.

A checkpoint is written into a hidden folder, synced and renamed, so a reader never sees a partial one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomic
from pipeline.checkpoints.base import hash_file
from pipeline.checkpoints.checkpoint import SHOWN_S
from pipeline.checkpoints.manifest import MANIFEST, TOKENIZER, CheckpointManifest, FileDigest, ParamEntry, rank_file
from pipeline.checkpoints.shards import everything, first_not_finite, shards
from pipeline.parallel.zero3 import Zero3Stage

Phase = Callable[[], Any]
"""One rank's work before all ranks continue. It may run in a thread, so it must not call collectives."""
Files = dict[str, FileDigest]


class DivergedError(UserError):
    """The run has diverged: its weights, optimizer states or losses are not finite."""


class _NotFiniteError(Exception):
    """A rank's shards are not finite, so they are not written."""


@dataclass(frozen=True)
class Target:
    """Where a checkpoint is written; the same on every rank."""

    final: Path
    token: str
    """Unique to this start of the run, so a rank left over from an earlier start cannot interfere."""

    @property
    def hidden(self) -> Path:
        """The folder it is written in."""
        return self.final.with_name(f".{self.final.name}.{self.token}.tmp")


class HostCopy:
    """A rank's shards at one step, copied to host memory.

    The memory (12 bytes per trained parameter of this rank, plus its frozen ones) is allocated at the first copy and
    reused. On GPU machines it is pinned, and torch rounds the size of each tensor up to a power of two.
    """

    def __init__(self, stage: Zero3Stage, stores: Callable[[str], bool] = everything) -> None:
        """Copy shards of ``stage``; nothing is allocated yet. ``stores``: see `pipeline.checkpoints.shards.shards`."""
        self._stage, self._stores = stage, stores
        self._copies: dict[str, torch.Tensor] = {}

    def take(self) -> dict[str, torch.Tensor]:
        """Return a copy of the current shards, valid until the next call."""
        pinned = torch.cuda.is_available()
        for key, shard in shards(self._stage, self._stores):
            if key not in self._copies:
                self._copies[key] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=pinned)
            self._copies[key].copy_(shard, non_blocking=True)
        if pinned:
            torch.cuda.synchronize()
        return self._copies


def describe(stage: Zero3Stage, stores: Callable[[str], bool] = everything) -> dict[str, ParamEntry]:
    """Return this rank's share of the manifest's ``params``: those of its stage if this is dp rank 0, else none.

    ``stores``: see `pipeline.checkpoints.shards.shards`.
    """
    if stage.topology.dp_rank:
        return {}
    return {
        name: ParamEntry(
            tuple(stage.full_shape(param)),
            stage.topology.stage,
            param.requires_grad,
            stored=param.requires_grad or stores(name),
        )
        for name, param in stage.module.named_parameters()
    }


def save_phases(
    own: dict[str, torch.Tensor], target: Target, manifest: CheckpointManifest, *, rank: int, tokenizer: Path
) -> Generator[Phase, list[Any], None]:
    """Yield a rank's phases of a save in order; all ranks must finish a phase before the next is requested.

    Args:
        own: The rank's shards, as of `shards`.
        target: Where the checkpoint is written.
        manifest: Its manifest, without the files.
        rank: This rank; 0 publishes.
        tokenizer: Folder of the tokenizer, saved by rank 0.

    The caller sends back the results of a phase on all ranks, in rank order.
    """
    files = yield lambda: _write(own, target.hidden, rank, tokenizer if rank == 0 else None)
    whole = replace(manifest, files={name: entry for each in files for name, entry in each.items()})
    yield lambda: _publish(target, whole) if rank == 0 else None


def gather_phase(phase: Future[Any], what: Path) -> list[Any]:
    """Wait until all ranks have finished a phase; return their results, in rank order. Collective.

    Raises, on all ranks alike:
        DivergedError: A rank's shards are not finite.
        UserError: A rank could not write.
    """
    result, fault, not_finite = None, "", ""
    try:
        result = phase.result()
    except (OSError, SafetensorError) as error:
        fault = str(error)
    except _NotFiniteError as error:
        not_finite = str(error)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, fault, not_finite))
    for rank, (_, _, what_is_not) in enumerate(gathered):
        if what_is_not:
            raise DivergedError(f"{what.name} is not saved: {what_is_not} (rank {rank}) is not finite: lower train.lr")
    faults = sorted({fault for _, fault, _ in gathered if fault})
    if faults:
        raise UserError(f"{what} cannot be written ({faults[0]}): fix that and run the same command again")
    return [result for result, _, _ in gathered]


def _write(own: dict[str, torch.Tensor], folder: Path, rank: int, tokenizer: Path | None) -> Files:
    """Write one rank's shards and, if given, the tokenizer; return their manifest entries.

    Raises _NotFiniteError before anything is written if the shards are not finite.
    """
    if (name := first_not_finite(own)) is not None:
        raise _NotFiniteError(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(rank)
    save_file({key: tensor.cpu().contiguous() for key, tensor in own.items()}, path)
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    files = {path.name: _sync_and_hash(path)}
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for source in sorted(tokenizer.iterdir()):
            copy = Path(shutil.copyfile(source, folder / TOKENIZER / source.name))
            files[f"{TOKENIZER}/{source.name}"] = _sync_and_hash(copy)
    return files


def _sync_and_hash(path: Path) -> FileDigest:
    """Sync a file to disk; return its manifest entry."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return FileDigest(path.stat().st_size, hash_file(path))


def _publish(target: Target, manifest: CheckpointManifest) -> None:
    """Publish a written checkpoint atomically. Raises OSError when rank 0 cannot see all files."""
    deadline = time.monotonic() + SHOWN_S
    for name, entry in manifest.files.items():
        path = target.hidden / name
        while not path.is_file() or path.stat().st_size != entry.bytes:
            if time.monotonic() > deadline:
                raise OSError(f"rank 0 does not see {path}: the run folder must be on a disk shared by all nodes")
            time.sleep(0.2)
    write_atomic(target.hidden / MANIFEST, manifest.to_json().encode())
    _sync_folder(target.hidden / TOKENIZER)
    _sync_folder(target.hidden)
    shutil.rmtree(target.final, ignore_errors=True)
    target.hidden.rename(target.final)
    _sync_folder(target.final.parent)


def _sync_folder(path: Path) -> None:
    """Sync the directory entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
