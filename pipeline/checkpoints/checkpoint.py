"""Sharded checkpoints, published atomically, that load on any grid of ranks.

One folder per checkpoint: a safetensors file per rank with flat fp32 shards of its stage's parameters and optimizer
state (``master|NAME``, ``exp_avg|NAME``, ``exp_avg_sq|NAME``; ``frozen|NAME`` in the compute type), and a manifest with
the shape of every parameter, the grid, the training state and a hash of every file. Parameter names are global
(``model.layers.7...``), so a shard of another grid is a slice of a few files. The tokenizer is included, so checkpoints
can be moved and exported. Nothing is pickled, and nothing outside the folder is read, but for the base weights of a run
with LoRA (`pipeline.checkpoints.base`): safetensors whose hashes are in the manifest.

`pipeline.checkpoints.writing` writes them.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from data_prep.common.errors import UserError
from pipeline.attention.gate import is_gate
from pipeline.checkpoints.base import base_faults, hash_file, open_source
from pipeline.checkpoints.manifest import MANIFEST, TOKENIZER, ParamEntry, is_plain_file, rank_file, read_manifest
from pipeline.checkpoints.shards import first_not_finite, shards
from pipeline.config.schema import LoraConfig
from pipeline.model import lora
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import WeightSource
from pipeline.parallel.zero3 import STATES, Zero3Stage

_NAME = re.compile(r"step-\d{8}")
SHOWN_S = 30.0
"""How long a network file system may take to show one node the files of another."""
_TYPES = {"frozen": ("F32", "BF16")}
_View = tuple[list[str], str]
"""A checkpoint as one rank sees it: its faults and the hash of its manifest."""


class Checkpoint:
    """A finished checkpoint folder, readable tensor by tensor or slice by slice, by any process."""

    def __init__(self, path: Path | str) -> None:
        """Read the manifest. Raises UserError when the folder is not a complete checkpoint of this format."""
        self.path = Path(path)
        self.manifest, self.digest = read_manifest(self.path)
        self._open: dict[int, Any] = {}

    def faults(self, *, rank: int = 0, world: int = 1) -> list[str]:
        """Hash this rank's share of the files; return a line for each one that is missing or damaged."""
        lines = []
        for name in sorted(self.manifest.files)[rank::world]:
            path, entry = self.path / name, self.manifest.files[name]
            try:
                if not is_plain_file(path) or (path.parent.is_symlink() and path.parent != self.path):
                    lines.append(f"{path} is missing or not a regular file")
                elif path.stat().st_size != entry.bytes or hash_file(path) != entry.xxh3:
                    lines.append(f"{path} is damaged")
            except OSError as error:
                lines.append(f"{path} cannot be read ({error.strerror})")
        for base in self.manifest.base:
            lines += [f"{self.path}: {fault}" for fault in base_faults(base, rank=rank, world=world)]
            if base.kind == "checkpoint" and not lines:
                lines += Checkpoint(base.path).faults(rank=rank, world=world)
        return lines

    def _shards(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.path / rank_file(rank)
            if not is_plain_file(path):
                raise UserError(f"{path} is missing or not a regular file: use another checkpoint")
            try:
                self._open[rank] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from error
        return self._open[rank]

    def _shard(self, rank: int, kind: str, name: str) -> Any:
        """Return one rank's shard of a tensor, unread. Raises UserError unless it is 1-D and of a saved type."""
        try:
            shard = self._shards(rank).get_slice(f"{kind}|{name}")
            shape, dtype = shard.get_shape(), shard.get_dtype()
        except SafetensorError as error:
            raise UserError(f"{self.path / rank_file(rank)} has no {kind}|{name}: use another checkpoint") from error
        if len(shape) != 1 or dtype not in _TYPES.get(kind, ("F32",)):
            raise UserError(
                f"{self.path / rank_file(rank)}: {kind}|{name} is {dtype}{shape}, not a type or shape that a run saves"
            )
        return shard

    def read_flat(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start .. stop - 1`` of a flattened parameter or optimizer state (1-D, as saved).

        Raises UserError where the shards contradict the manifest.
        """
        entry, dp = self.manifest.params[name], self.manifest.dp
        size = -(-torch.Size(entry.shape).numel() // dp)  # of every rank's shard; the last ones are padded to it
        pieces = []
        for dp_rank in range(start // size, -(-stop // size)) if stop > start else ():
            shard = self._shard(entry.stage * dp + dp_rank, kind, name)
            if (found := shard.get_shape()[0]) != size:
                raise UserError(
                    f"{self.path / rank_file(entry.stage * dp + dp_rank)}: {kind}|{name} has {found} elements, "
                    f"but a rank's shard of shape {list(entry.shape)} has {size}: use another checkpoint"
                )
            offset = dp_rank * size
            pieces.append(shard[max(start - offset, 0) : min(stop - offset, size)])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def weight(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start .. stop - 1`` of a flattened parameter of the model, its adapter merged into it.

        fp32 if it is trained or has an adapter, else the compute type. Raises UserError as :meth:`read_flat` does.
        """
        entry = self.manifest.params[name]
        read = partial(self.read_flat, _kind(entry)) if entry.stored else self._in_base
        flat = read(name, start, stop)
        module = name.removesuffix(".weight")
        if self.lora is None or f"{module}.{lora.A}" not in self.manifest.params or stop <= start:
            return flat
        width = entry.shape[1]
        rows = range(start // width, -(-stop // width))
        a, b = (self._adapter(f"{module}.{own}") for own in (lora.A, lora.B))
        update = lora.merged_update(a, b[rows.start : rows.stop], self.lora).flatten()
        return flat.float() + update[start - rows.start * width : stop - rows.start * width]

    @cached_property
    def lora(self) -> LoraConfig | None:
        """The adapters of the model; None without LoRA."""
        raw = self.manifest.model["spec"].get("lora")
        return LoraConfig.model_validate(raw) if raw else None

    def _adapter(self, name: str) -> torch.Tensor:
        entry = self.manifest.params[name]
        return self.read_flat(_kind(entry), name, 0, torch.Size(entry.shape).numel()).view(entry.shape)

    @cached_property
    def _base(self) -> Checkpoint | WeightSource | None:
        given = next((base for base in self.manifest.base if base.kind == "checkpoint"), None)
        if given is not None:
            return Checkpoint(given.path)
        return open_source(ModelSpec.from_dict(self.manifest.model["spec"]), self.manifest.base)

    def _in_base(self, name: str, start: int, stop: int) -> torch.Tensor:
        base, shape = self._base, self.manifest.params[name].shape
        dtype = torch.bfloat16 if self.manifest.model.get("dtype") == "bfloat16" else torch.float32
        if isinstance(base, Checkpoint):
            if has_weight(base, name):
                return base.weight(_as_saved(name, base), start, stop).to(dtype)
        elif base is not None and name in base:
            return base.read(name, shape).flatten()[start:stop].to(dtype)
        raise UserError(f"{self.path}: the base weights have no parameter {name}: use another checkpoint")

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of the model whole, one at a time, adapters merged; see :meth:`weight`."""
        for name, entry in self.manifest.params.items():
            if not lora.is_adapter(name):
                yield name, self.weight(name, 0, torch.Size(entry.shape).numel()).view(entry.shape)

    def trained_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter that is trained, and every adapter, whole and as it is."""
        for name, entry in self.manifest.params.items():
            if entry.trained or lora.is_adapter(name):
                yield name, self.read_flat(_kind(entry), name, 0, torch.Size(entry.shape).numel()).view(entry.shape)

    @property
    def meta(self) -> dict[str, Any]:
        """The description of the model as :meth:`parameters` gives it, and its tokenizer's folder, for export."""
        spec = {**self.manifest.model["spec"], "lora": None}
        return {**self.manifest.model, "spec": spec, "tokenizer": str(self.path / TOKENIZER)}


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the published checkpoint folders of a run, newest first, intact or not."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder. Raises UserError when there is none."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return Checkpoint(path)
    folders = checkpoint_folders(path)
    if not folders:
        raise UserError(f"{path} has no checkpoint: give a trained run folder or a checkpoint folder")
    return Checkpoint(folders[0])


def newest_intact(path: Path, *, rank: int, world: int) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint and the faults of newer ones; ranks share the hashing. Collective.

    ``path`` is a run folder or a checkpoint folder. Rank 0 lists the folders, and all ranks must see the same
    checkpoint: on a network file system, a node may not see yet what another has written.
    """
    faults_found: list[str] = []
    folders = [path] if (path / MANIFEST).is_file() else checkpoint_folders(path)
    for folder, has_manifest in _broadcast_from_rank0([(folder, (folder / MANIFEST).is_file()) for folder in folders]):
        if has_manifest:
            _wait_for(folder / MANIFEST)
        checkpoint, faults = _inspect(folder, rank, world)
        views = _all_gather((faults, checkpoint.digest if checkpoint else ""))
        faults = list(dict.fromkeys(fault for theirs, _ in views for fault in theirs))
        if not faults and len({manifest for _, manifest in views}) > 1:
            faults = [f"{folder} differs between nodes: the run folder must be on a shared disk"]
        if not faults:
            return checkpoint, faults_found
        faults_found += faults
    return None, faults_found


def _wait_for(path: Path) -> None:
    """Wait for a network file system to show a file that another node sees."""
    deadline = time.monotonic() + SHOWN_S
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)


def _inspect(folder: Path, rank: int, world: int) -> tuple[Checkpoint | None, list[str]]:
    """Open a checkpoint and hash this rank's share of its files; return it with its faults."""
    try:
        checkpoint = Checkpoint(folder)
        return checkpoint, checkpoint.faults(rank=rank, world=world)
    except UserError as error:
        return None, [str(error)]


def load(stage: Zero3Stage, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
    """Fill a stage's shards from a checkpoint of any grid. Raises UserError where the parameters do not match."""
    kinds = [("master", None)] if weights_only else [("master", None), *((state, state) for state in STATES)]
    for name, param in stage.trainable():
        if weights_only and _is_new(name, checkpoint):
            continue
        name = _as_saved(name, checkpoint)
        if weights_only and lora.is_adapter(name):
            continue  # merged into the weights; the new run's own adapters start from zero
        start, entry = _own_range(stage, name, param, checkpoint)
        if not (entry.trained or weights_only):
            raise UserError(
                f"{checkpoint.path}: {name} was frozen, so it has no optimizer state to resume from: keep it frozen, "
                f"or start another --run-dir with --init-from {checkpoint.path}"
            )
        for kind, state in kinds:
            read = checkpoint.weight if weights_only else partial(checkpoint.read_flat, kind)
            _copy_range(stage.master_shard(param, state), read, name, start, entry)
    for name, param in stage.frozen():
        name = _as_saved(name, checkpoint)
        if weights_only and (lora.is_adapter(name) or _is_new(name, checkpoint)):
            continue
        start, entry = _own_range(stage, name, param, checkpoint)
        if entry.stored or weights_only:  # else it was read from the base weights when the stage was built
            read = checkpoint.weight if weights_only else partial(checkpoint.read_flat, _kind(entry))
            _copy_range(stage.compute_shard(param), read, name, start, entry)
    stage.finish_load(0 if weights_only else checkpoint.manifest.optimizer_steps)
    if (odd := first_not_finite(dict(shards(stage)))) is not None:
        raise UserError(f"{checkpoint.path}: {odd} is not finite: use another checkpoint")


def prune(
    run_dir: Path, keep_last: int, *, newest: Path, proven: int, keep_every: int = 0, best: int | None = None
) -> None:
    """Keep ``newest``, the ones just before it, those of every ``keep_every``-th step and of ``best``; remove others.

    The newest checkpoint up to step ``proven`` is kept, too, whatever ``keep_last``: a later step had a finite loss.
    Damaged checkpoints of later steps, which the run did not resume from, are removed. ``newest`` must be intact and is
    never removed. Unfinished folders stay: other ranks may have begun the next save.
    """
    folders = checkpoint_folders(run_dir)
    earlier = [folder for folder in folders if folder.name <= newest.name]
    kept = earlier[:keep_last] + [folder for folder in earlier if keep_every and step_of(folder) % keep_every == 0]
    kept += [folder for folder in earlier if step_of(folder) <= proven][:1]
    kept += [folder for folder in earlier if step_of(folder) == best]
    for old in [folder for folder in folders if folder not in kept]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is hidden first, so an interrupted removal leaves no partial checkpoint."""
    hidden = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    with suppress(OSError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def set_aside_unproven(run_dir: Path, proven: int) -> list[Path]:
    """Rename the checkpoints after step ``proven`` to ``diverged-step-N``: no start resumes from them.

    They stay where they are if they are the only ones. Returns their former names.
    """
    found = checkpoint_folders(run_dir)
    folders = [folder for folder in found if step_of(folder) > proven]
    if len(folders) == len(found):
        return []
    for folder in folders:
        aside = folder.with_name(f"diverged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return folders


def unfinished_folders(run_dir: Path) -> list[Path]:
    """Return the folders of saves in progress or interrupted."""
    return sorted((run_dir / "checkpoints").glob(".step-*.tmp"))


def remove_unfinished(run_dir: Path) -> None:
    """Remove the remains of interrupted saves and removals; only at the start of a run, when no save is in progress."""
    for folder in [*unfinished_folders(run_dir), *(run_dir / "checkpoints").glob(".old-step-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Return the step of a published checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def has_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a checkpoint has a parameter of the model, stored or in its base weights."""
    return _as_saved(name, checkpoint) in checkpoint.manifest.params


def _kind(entry: ParamEntry) -> str:
    """Return what a stored parameter's value is kept as."""
    return "master" if entry.trained else "frozen"


def _as_saved(name: str, checkpoint: Checkpoint) -> str:
    """Return the name that a parameter was saved under: a tied head is the embedding if one stage held both."""
    tied = name == "lm_head.weight" and checkpoint.meta["spec"]["llm"].get("tie_word_embeddings")
    return "model.embed_tokens.weight" if tied and name not in checkpoint.manifest.params else name


def _is_new(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a parameter belongs to new gates, which keep the values they were built with."""
    return is_gate(name) and not any(map(is_gate, checkpoint.manifest.params))


def _own_range(
    stage: Zero3Stage, name: str, param: torch.nn.Parameter, checkpoint: Checkpoint
) -> tuple[int, ParamEntry]:
    saved = checkpoint.manifest.params
    if name not in saved:
        raise UserError(f"{checkpoint.path} has no parameter {name}: it was trained with a different model section")
    shape = tuple(stage.full_shape(param))
    if saved[name].shape != shape:
        raise UserError(f"{checkpoint.path}: {name} has shape {saved[name].shape}, but {shape} in the model section")
    return stage.topology.dp_rank * stage.compute_shard(param).numel(), saved[name]


def _copy_range(
    into: torch.Tensor, read: Callable[[str, int, int], torch.Tensor], name: str, start: int, entry: ParamEntry
) -> None:
    """Copy a rank's share of a parameter, which ``read(name, start, stop)`` returns."""
    stop = min(start + into.numel(), torch.Size(entry.shape).numel())
    values = read(name, start, stop) if stop > start else torch.empty(0)
    into.zero_()
    into[: values.numel()].copy_(values)


def _broadcast_from_rank0(own: list[tuple[Path, bool]]) -> list[tuple[Path, bool]]:
    """Return rank 0's list on every rank."""
    lists = [own]
    if dist.is_initialized():
        dist.broadcast_object_list(lists, 0)
    return lists[0]


def _all_gather(own: _View) -> list[_View]:
    """Return every rank's view, in the order of ranks."""
    if not dist.is_initialized():
        return [own]
    views = [own] * dist.get_world_size()
    dist.all_gather_object(views, own)
    return views
