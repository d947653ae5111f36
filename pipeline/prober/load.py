"""Models and batches named on the command line: a folder, a function, or a layout."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from data_prep.common.errors import UserError, one_line
from data_prep.packs import PackReader
from pipeline.masks import parse_layout, position_ids
from pipeline.prober.batch import IGNORE
from pipeline.prober.own import StageSubject, pack_batch
from pipeline.serving.model import load_model

LAYOUT = "Q6 A4 Q3 A3 | Q5 A4 Q2 A2"
"""The packed row that a text model is probed on by default."""
_FIRST_ID = 3
"""Lower ids are usually special tokens."""

Batches = Iterable[Mapping[str, Any]]


def load(model: str, batches: str | None, rows: range) -> tuple[Callable[..., Any], Batches]:
    """Load what ``mma prove --model MODEL --batches BATCHES`` names.

    Args:
        model: a folder of a transformers model, an export of this project, or ``module:function``, a function without
            arguments that returns a module or a callable.
        batches: ``module:function`` that returns a list of batches; for an export a pack folder; for a text model a
            layout (None: ``LAYOUT``).
        rows: of the pack folder.

    Raises:
        UserError: something cannot be found, loaded or combined.
    """
    if not Path(model).is_dir():
        subject = _call(model, "--model")
        if batches is None:
            raise UserError(f"--model {model} is a function: give its batches with --batches module:function")
        return subject, _call(batches, "--batches")
    if _is_export(Path(model)):
        return _export(model, batches, rows)
    subject = _pretrained(model)
    if batches is not None and ":" in batches:
        return subject, _call(batches, "--batches")
    return subject, [_text_batch(subject, batches or LAYOUT)]


def _call(spec: str, flag: str) -> Any:
    """Import ``module:function``, also from the current folder, and call it."""
    module, _, function = spec.partition(":")
    if not (module and function):
        raise UserError(f"{flag} {spec}: no such folder; for a function write module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{flag} {spec}: {one_line(error)}") from error
    return found()


def _is_export(folder: Path) -> bool:
    config = folder / "config.json"
    try:
        return "mma" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: no readable config.json ({one_line(error)}): name a model folder") from error


def _export(folder: str, batches: str | None, rows: range) -> tuple[StageSubject, Batches]:
    if batches is None or not Path(batches).is_dir():
        raise UserError(f"--model {folder} is an export: name a pack folder with --batches")
    model = load_model(folder, dtype=torch.float32)
    if model.spec.extra_towers:
        raise UserError(
            f"--model {folder} has several vision towers; the probe feeds one: probe a model with one tower"
        )
    packs = PackReader(batches)
    subject = StageSubject(model.stage, model.policy, packs.manifest.image_id)
    return subject, (pack_batch(packs, row, model.spec.preprocess) for row in rows)


def _pretrained(folder: str) -> Any:
    """Load a transformers model in fp32, in training mode, without a cache in its forward: as Trainer runs it."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {folder}: {one_line(error)}") from error
    model.config.get_text_config().use_cache = False
    return model.train()


def _text_batch(model: Any, layout: str) -> dict[str, torch.Tensor]:
    """Return a packed row of random text; a model of several position planes gets four."""
    sidecars = parse_layout(layout)
    if sidecars.modality.any():
        raise UserError(f"the layout '{layout}' has media, whose pixels differ by model: use --batches module:function")
    text = model.config.get_text_config()
    banned = {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")}
    known = torch.tensor([i for i in range(_FIRST_ID, min(text.vocab_size, 4096)) if i not in banned])
    ids = known[torch.randint(len(known), (1, len(sidecars)), generator=torch.Generator().manual_seed(0))]
    positions = position_ids(sidecars)[None]
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
        positions = positions[None].expand(4, 1, -1)
    labels = torch.where(sidecars.generated[None] == 1, ids, IGNORE)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
