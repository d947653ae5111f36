"""Sharded checkpoints that are all there or not there, and load on any grid of ranks.

One folder per checkpoint: a safetensors file per rank with flat fp32 shards of its stage's parameters and optimizer
state (``master|NAME``, ``exp_avg|NAME``, ``exp_avg_sq|NAME``; ``frozen|NAME`` in the compute type), and a manifest with
the shape of every parameter, the grid, the training state and a hash of every file. Parameter names are global
(``model.layers.7...``), so a shard of any other grid is a slice of a few files. The tokenizer lies beside them, so that
a checkpoint can be exported wherever it is moved to. Nothing is pickled.

A checkpoint is written into a hidden folder, synced, and renamed: a reader never meets half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.errors import UserError
from data_prep.packs import write_atomic
from pipeline.parallel.zero3 import STATES, Zero3Stage

FORMAT = "mma-checkpoint"
VERSION = 1
TOKENIZER = "tokenizer"
_NAME = re.compile(r"step-\d{8}")
_Said = TypeVar("_Said")


@dataclass(frozen=True)
class ParamEntry:
    """One parameter of the model: its whole shape, the stage that holds it, and whether it trains."""

    shape: tuple[int, ...]
    stage: int
    trained: bool


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds beside tensors."""

    step: int
    """Optimizer steps taken, skipped ones included."""
    optimizer_steps: int
    """Updates AdamW counted."""
    consumed_packs: int
    plan_sha256: str
    """Identity of the packs' order; resuming on another is refused."""
    batch_packs: int
    pp: int
    dp: int
    config: dict[str, Any]
    model: dict[str, Any]
    """What export needs to rebuild the model (see `pipeline.model.spec`)."""
    params: dict[str, ParamEntry] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File name -> bytes and xxh3-128."""


class Checkpoint:
    """A finished checkpoint folder, readable tensor by tensor or slice by slice, by any process."""

    def __init__(self, path: Path | str) -> None:
        """Read the manifest. Raises UserError when the folder is not a whole checkpoint of this format."""
        self.path = Path(path)
        try:
            raw = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            if (raw.pop("format"), raw.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"not a {FORMAT} of version {VERSION}")
            params = {
                name: ParamEntry(tuple(e["shape"]), e["stage"], e["trained"]) for name, e in raw.pop("params").items()
            }
            self.manifest = CheckpointManifest(**raw, params=params)
            self._open: dict[int, Any] = {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not a whole checkpoint ({error})") from error

    def faults(self, *, part: int = 0, parts: int = 1) -> list[str]:
        """Hash every ``parts``-th file from ``part`` on; return a line for each that is missing or altered."""
        lines = []
        for name in sorted(self.manifest.files)[part::parts]:
            path, entry = self.path / name, self.manifest.files[name]
            if not path.is_file():
                lines.append(f"{path} is missing")
            elif path.stat().st_size != entry["bytes"] or _hash(path) != entry["xxh3"]:
                lines.append(f"{path} is damaged")
        return lines

    def _shards(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.path / rank_file(rank)
            try:
                self._open[rank] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): name another checkpoint") from error
        return self._open[rank]

    def read_flat(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start .. stop - 1`` of a flattened parameter or optimizer state (1-D, as saved)."""
        entry, dp = self.manifest.params[name], self.manifest.dp
        pieces, first_rank = [], entry.stage * dp
        for rank in range(first_rank, first_rank + dp):
            shard = self._shards(rank).get_slice(f"{kind}|{name}")
            size = shard.get_shape()[0]
            lo, hi = start - (rank - first_rank) * size, stop - (rank - first_rank) * size
            if lo < size and hi > 0:
                pieces.append(shard[max(lo, 0) : min(hi, size)])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter whole, one at a time (fp32 for trained ones, the compute type for frozen ones)."""
        for name, entry in self.manifest.params.items():
            numel = torch.Size(entry.shape).numel()
            yield name, self.read_flat("master" if entry.trained else "frozen", name, 0, numel).view(entry.shape)

    @property
    def meta(self) -> dict[str, Any]:
        """The model's description and its tokenizer's folder, as export wants them."""
        return {**self.manifest.model, "tokenizer": str(self.path / TOKENIZER)}


def rank_file(rank: int) -> str:
    """Return the file name of one rank's shards."""
    return f"rank-{rank:05d}.safetensors"


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the finished checkpoint folders of a run, newest first (whole or damaged; hidden ones are unfinished)."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder. Raises UserError when there is none."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return Checkpoint(path)
    folders = checkpoint_folders(path)
    if not folders:
        raise UserError(f"{path} holds no checkpoint: give a run folder that was trained, or a checkpoint folder")
    return Checkpoint(folders[0])


def newest_whole(path: Path, *, rank: int, world: int) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint and what was wrong with newer ones; all ranks share the hashing.

    ``path`` is a run folder, or one checkpoint folder.
    """
    complaints: list[str] = []
    for folder in [path] if (path / "manifest.json").is_file() else checkpoint_folders(path):
        try:
            checkpoint = Checkpoint(folder)
            faults = checkpoint.faults(part=rank, parts=world)
        except UserError as error:
            checkpoint, faults = None, [str(error)]
        if not _any_rank(bool(faults)):
            return checkpoint, complaints
        complaints += faults or [f"{folder}: damaged (seen by another rank)"]
    return None, complaints


def save(stage: Zero3Stage, folder: Path, manifest: CheckpointManifest, *, tokenizer: Path) -> Path:
    """Write one checkpoint from all ranks; return its folder. Every rank must call it at the same step.

    Raises UserError on all ranks alike when one of them cannot write (a full disk, say); nothing is left of it then.
    """
    rank = stage.topology.rank
    final = folder / f"step-{manifest.step:08d}"
    hidden = folder / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(hidden, ignore_errors=True)
    dist.barrier()
    try:
        written = _together(lambda: (_write_rank(stage, hidden / rank_file(rank)), _describe(stage)), final)
        _together(lambda: _publish(hidden, final, manifest, written, tokenizer) if rank == 0 else None, final)
    except UserError:
        if rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    return final


def _together(write: Callable[[], _Said], what: Path) -> list[_Said]:
    """Let every rank write, and return what each has to say, once all are done."""
    said, fault = None, ""
    try:
        said = write()
    except (OSError, SafetensorError) as error:
        fault = str(error)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (said, fault))
    faults = sorted({fault for _, fault in gathered if fault})
    if faults:
        raise UserError(f"{what} cannot be written ({faults[0]}): mend that, and the same command goes on")
    return [said for said, _ in gathered]


def load(stage: Zero3Stage, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
    """Fill a stage's shards from a checkpoint of any grid. Raises UserError where parameters do not match."""
    kinds = [("master", None)] if weights_only else [("master", None), *((state, state) for state in STATES)]
    for name, param in stage.trainable():
        name = _as_saved(name, checkpoint)
        start, entry = _own_range(stage, name, param, checkpoint)
        for kind, state in kinds:
            kind = kind if entry.trained else "frozen"
            _copy_range(stage.master_shard(param, state), checkpoint, kind, name, start, entry)
    for name, param in stage.frozen():
        start, entry = _own_range(stage, name, param, checkpoint)
        _copy_range(stage.compute_shard(param), checkpoint, "master" if entry.trained else "frozen", name, start, entry)
    stage.finish_load(0 if weights_only else checkpoint.manifest.optimizer_steps)


def prune(run_dir: Path, keep_last: int, *, newest: Path) -> None:
    """Keep ``newest`` and the whole ones just before it; remove older ones and what no run can use.

    That is unfinished folders, and damaged ones of later steps, which the run has gone back from.
    """
    folders = checkpoint_folders(run_dir)
    kept = [folder for folder in folders if folder.name <= newest.name][:keep_last]
    torn = (run_dir / "checkpoints").glob(".step-*.tmp")
    for old in [*(folder for folder in folders if folder not in kept), *torn]:
        shutil.rmtree(old, ignore_errors=True)


def _write_rank(stage: Zero3Stage, path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, param in stage.trainable():
        tensors[f"master|{name}"] = stage.master_shard(param).cpu()
        for state in STATES:
            tensors[f"{state}|{name}"] = stage.master_shard(param, state).cpu()
    for name, param in stage.frozen():
        tensors[f"frozen|{name}"] = stage.compute_shard(param).cpu()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    return _seal(path)


def _seal(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; return its entry in the manifest."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _hash(path)}


def _describe(stage: Zero3Stage) -> dict[str, dict[str, Any]]:
    if stage.topology.replica:
        return {}
    return {
        name: {"shape": tuple(stage.full_shape(param)), "stage": stage.topology.stage, "trained": param.requires_grad}
        for name, param in stage.module.named_parameters()
    }


def _publish(
    hidden: Path, final: Path, manifest: CheckpointManifest, written: list[tuple[Any, dict[str, Any]]], tokenizer: Path
) -> None:
    raw = asdict(manifest)
    raw["files"] = {rank_file(rank): own for rank, (own, _) in enumerate(written)}
    (hidden / TOKENIZER).mkdir()
    for source in sorted(tokenizer.iterdir()):
        copy = shutil.copyfile(source, hidden / TOKENIZER / source.name)
        raw["files"][f"{TOKENIZER}/{source.name}"] = _seal(copy)
    raw["params"] = {name: entry for _, described in written for name, entry in described.items()}
    text = json.dumps({"format": FORMAT, "version": VERSION, **raw}, indent=1)
    write_atomic(hidden / "manifest.json", text.encode())
    shutil.rmtree(final, ignore_errors=True)
    hidden.rename(final)
    _sync_folder(final.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_saved(name: str, checkpoint: Checkpoint) -> str:
    """Return the name a parameter was saved under: a tied head is the embedding where one stage held both."""
    tied = name == "lm_head.weight" and checkpoint.meta["spec"]["llm"]["tie_word_embeddings"]
    return "model.embed_tokens.weight" if tied and name not in checkpoint.manifest.params else name


def _own_range(
    stage: Zero3Stage, name: str, param: torch.nn.Parameter, checkpoint: Checkpoint
) -> tuple[int, ParamEntry]:
    saved = checkpoint.manifest.params
    if name not in saved:
        raise UserError(f"{checkpoint.path} has no parameter {name}: it was trained with another model section")
    shape = tuple(stage.full_shape(param))
    if saved[name].shape != shape:
        raise UserError(f"{checkpoint.path}: {name} is {saved[name].shape}, the model section says {shape}")
    return stage.topology.replica * stage.compute_shard(param).numel(), saved[name]


def _copy_range(into: torch.Tensor, source: Checkpoint, kind: str, name: str, start: int, entry: ParamEntry) -> None:
    stop = min(start + into.numel(), torch.Size(entry.shape).numel())
    values = source.read_flat(kind, name, start, stop) if stop > start else torch.empty(0)
    into.zero_()
    into[: values.numel()].copy_(values)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _any_rank(flag: bool) -> bool:
    if not dist.is_initialized():
        return flag
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
