"""Exports what a run with LoRA has trained as a folder of the `peft` library: ``mma export RUN OUT --adapter``.

``OUT`` holds ``adapter_config.json`` and ``adapter_model.safetensors`` of the language model; ``peft.PeftModel`` loads
it onto the stock decoder. ``OUT/vision`` holds the same for a tower, and ``OUT/connector.safetensors`` the connector,
under its global names. It appears atomically.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from data_prep.common.errors import UserError
from pipeline.model.lora import is_adapter
from pipeline.model.spec import ModelSpec

if TYPE_CHECKING:
    from pipeline.checkpoints.checkpoint import Checkpoint
    from pipeline.config.schema import LoraConfig

_PREFIX = "base_model.model."  # peft's name of the model it wraps


def export_adapter(run: Path | str, out: Path | str) -> Path:
    """Export the adapters of a run folder's newest checkpoint, or of a checkpoint folder, after verifying it.

    Raises UserError: the folder exists, the run has no LoRA, or the checkpoint is damaged.
    """
    from pipeline.parallel.launch import configure_libraries

    configure_libraries()  # reading checkpoints loads DeepSpeed
    from pipeline.checkpoints.checkpoint import open_checkpoint

    out, checkpoint = Path(out), open_checkpoint(run)
    if out.exists():
        raise UserError(f"{out} already exists: give a new folder, or remove it first")
    if checkpoint.lora is None:
        raise UserError(f"{run} was trained without LoRA, so it has no adapter: export it without --adapter")
    if faults := checkpoint.faults():
        raise UserError(f"{faults[0]}: name another checkpoint of the run")
    hidden = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        _write(checkpoint, checkpoint.lora, hidden)
        hidden.rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return out


def _write(checkpoint: Checkpoint, lora: LoraConfig, folder: Path) -> None:
    trained = {name: value.contiguous() for name, value in checkpoint.trained_parameters()}
    adapters = {name: value for name, value in trained.items() if is_adapter(name)}
    base: dict[str, str] = {each.kind: each.path for each in checkpoint.manifest.base}
    whole = base.get("checkpoint", base.get("export", ""))

    def write(part: str, place: Path, inside: str, cut: str, task: str) -> None:
        """Write the adapters ``inside`` a module, named without ``cut``."""
        own = {name.removeprefix(cut): value for name, value in adapters.items() if name.startswith(inside)}
        targets = [name.removeprefix(cut) for name in lora.targets if name.startswith(inside)]
        if own:
            _write_peft(place, own, _peft_config(lora, targets, base.get(part, whole), task))

    write("llm", folder, "model.", "", "CAUSAL_LM")
    for tower in ModelSpec.from_dict(checkpoint.manifest.model["spec"]).towers:
        write(tower, folder / tower, f"{tower}.", f"{tower}.", "FEATURE_EXTRACTION")
    if others := {name: value for name, value in trained.items() if not is_adapter(name)}:
        save_file(others, folder / "connector.safetensors", metadata={"format": "pt"})


def _peft_config(lora: LoraConfig, targets: list[str], base: str, task: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    return {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": 0.0,
        "target_modules": targets, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip


def _write_peft(folder: Path, adapters: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    named = {f"{_PREFIX}{name}": value for name, value in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
