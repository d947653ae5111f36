"""Exports a checkpoint as one self-contained folder of safetensors: ``mma export RUN OUT``.

The folder holds ``config.json`` (see `pipeline.serving.export_config`), sharded safetensors with an index,
``tokenizer/``, and the hashes of all files (see `pipeline.model.export_files`). It appears atomically, and at most one
shard is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.model.export_files import FILES, Coverage, check_files, check_finite, not_finite, write_file_hashes
from pipeline.model.export_names import Layout, exported_name
from pipeline.model.weights import INDEX, global_shapes
from pipeline.serving.card import write_card
from pipeline.serving.export_config import CONFIG, ExportConfig
from pipeline.serving.golden import write_golden
from pipeline.serving.hf_files import write_hf_files, write_json, write_own_files
from pipeline.serving.llava_files import check_llava, extra_tensors, reads_after_norm, write_llava_files
from pipeline.serving.vlm_files import check_vlm, write_vlm_files

SHARD_BYTES = 4 << 30


class SavedModel(Protocol):
    """The source of an export: a checkpoint, read one parameter at a time."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """The checkpoint's description of its model."""
        ...

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (global name, full parameter) of every parameter."""
        ...


def export_run(
    run: Path | str, out: Path | str, *, dtype: str = "auto", layout: Layout = "hf", prefill_causal: bool = False
) -> Path:
    """Export the newest checkpoint of a run folder, or one checkpoint folder, after verifying it; see :func:`export`.

    Raises UserError for a damaged checkpoint, and as :func:`export` does.
    """
    from pipeline.parallel.launch import configure_libraries

    configure_libraries()  # reading checkpoints loads DeepSpeed
    from pipeline.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(run)
    if faults := checkpoint.faults():
        raise UserError(f"{faults[0]}: name another checkpoint of the run")
    manifest = checkpoint.manifest
    facts = {
        "data": f"`{Path(str(manifest.config['data']['packs'])).name}` (plan {manifest.plan_sha256[:12]})",
        "training": f"{manifest.consumed_packs:,} packed rows, global batch of {manifest.global_batch_size}",
    }
    return export(
        checkpoint, out, dtype=dtype, step=manifest.step, layout=layout, prefill_causal=prefill_causal, facts=facts
    )


def model_folder(folder: Path | str) -> Path:
    """Return the model folder that ``folder`` names: itself, or the export of a run's newest checkpoint.

    The latter is ``RUN/export``; it is written first if it is missing or of an earlier step. Raises UserError as
    :func:`export_run` does.
    """
    from pipeline.parallel.launch import configure_libraries

    run = Path(folder)
    if (run / CONFIG).is_file() or not (run / "checkpoints").is_dir():
        return run
    configure_libraries()  # reading checkpoints loads DeepSpeed
    from pipeline.checkpoints.checkpoint import open_checkpoint

    made = run / "export"
    if made.exists():
        if ExportConfig.load(made).step == open_checkpoint(run).manifest.step:
            return made
        shutil.rmtree(made)
    return export_run(run, made)


def export(
    saved: SavedModel,
    out: Path | str,
    *,
    dtype: str = "auto",
    step: int = 0,
    layout: Layout = "hf",
    prefill_causal: bool = False,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint's model to the folder ``out``.

    Args:
        saved: the checkpoint.
        out: a folder that does not exist yet.
        dtype: ``bfloat16``, ``float32``, or ``auto`` for the dtype the model was trained in.
        step: optimizer steps behind the weights, recorded in the config.
        layout: ``hf``, loaded by the export's own code; ``llava``, loaded by the stock class; or ``vlm``, loaded by the
            stock class of the model that training started from.
        prefill_causal: with ``llava`` and ``vlm``, accept that the stock class has a mask of its own for prompts.
        facts: lines about data and training for the model card.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, the tokenizer is missing or cannot be exported exactly, the checkpoint lacks a
            parameter, a parameter is not finite in the exported dtype, or the layout cannot express the model.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists: give a new folder, or remove it first")
    export_config = ExportConfig.from_meta(saved.meta, step=step)
    export_config = export_config if dtype == "auto" else replace(export_config, dtype=dtype)
    if layout == "llava":
        check_llava(export_config, prefill_causal=prefill_causal)
    tokenizer = Tokenizer.load(saved.meta["tokenizer"])
    if layout == "vlm":
        check_vlm(export_config, tokenizer, prefill_causal=prefill_causal)
    hidden = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        spec = export_config.spec
        if spec.extra_towers or spec.media or spec.vision_family.native:  # the processor prepares squares of one size
            layout = "flat"
        _write_weights(export_config, _checked(export_config, saved), hidden, layout)
        _write_files(export_config, tokenizer, hidden, layout)
        write_card(export_config, hidden, facts or {}, layout, post_norm=reads_after_norm(export_config))
        write_golden(export_config, tokenizer, hidden)
        write_file_hashes(hidden)
        for path in hidden.rglob("*"):
            _sync(path)
        hidden.rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return out


def _write_files(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path, layout: Layout) -> None:
    """Write configs, tokenizer and processor."""
    writers = {"hf": write_hf_files, "llava": write_llava_files, "vlm": write_vlm_files, "flat": write_own_files}
    writers[layout](export_config, tokenizer, folder)


def _checked(export_config: ExportConfig, saved: SavedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's parameters, checked against the config; the second copy of a tied head is dropped."""
    missing = dict(global_shapes(export_config.spec))
    for name, tensor in saved.parameters():
        if export_config.spec.tied and name == "lm_head.weight":
            continue
        if missing.pop(name, None) != tuple(tensor.shape):
            raise UserError(f"the checkpoint's {name} of shape {list(tensor.shape)} does not fit its own model")
        yield name, tensor
    if missing:
        raise UserError(f"the checkpoint lacks {len(missing)} parameters ({', '.join(sorted(missing)[:3])}, ...)")


def _write_weights(
    export_config: ExportConfig, parameters: Iterator[tuple[str, torch.Tensor]], folder: Path, layout: Layout
) -> None:
    """Write shards of at most ``SHARD_BYTES`` as they fill, then rename and index them."""
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        _sync(folder / f"shard-{len(shards)}")
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in parameters:
        size = tensor.numel() * export_config.torch_dtype.itemsize
        if waiting and sum(x.nbytes for x in waiting.values()) + size > SHARD_BYTES:
            flush()
        waiting[exported_name(name, layout, export_config.spec.start)] = _converted(
            name, tensor, export_config.torch_dtype
        )
        total += size
    if layout == "llava":
        waiting |= extra_tensors(export_config)
    flush()
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for number, file in enumerate(files):
        shard = (folder / f"shard-{number}").rename(folder / file)
        shard.chmod((folder / INDEX).stat().st_mode)  # safetensors creates files that only their owner can read


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter in the exported dtype. Raises UserError when it is not finite."""
    converted = tensor.to(dtype).contiguous()
    if problem := not_finite(converted):
        fix = "the run diverged; export an earlier checkpoint" if not_finite(tensor) else "export with --dtype float32"
        raise UserError(f"the checkpoint's {name} {problem} as {str(dtype).removeprefix('torch.')}: {fix}")
    return converted


def verify_export(folder: Path | str, *, full: bool = False) -> Coverage:
    """Check an export against the hashes written with it, before anything in it is used.

    Args:
        folder: made by ``mma export``.
        full: read every byte and every tensor; else sizes, small files, headers and a sample of the weights.

    Returns:
        How many bytes were hashed; print it wherever a check is reported, because a quick check covers only a part.

    Raises:
        UserError: naming the first file that is missing, damaged or not listed; with ``full`` also the first tensor
            that is not finite; or the folder is not an export of this format version.
    """
    folder = Path(folder)
    if not (folder / FILES).is_file():
        ExportConfig.load(folder)  # explains a folder that is no export, or one of another version
        raise UserError(f"{folder / FILES} is missing: copy the export again, or export the run again")
    coverage = check_files(folder, full=full)
    if full:
        check_finite(folder)
    return coverage


def _sync(path: Path) -> None:
    if path.is_dir():
        return
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
