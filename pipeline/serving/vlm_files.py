"""The files of an export in the layout of the vision-language model that training started from.

The stock class loads the folder without code of its own, and runs prompts as it always does, not under the training
mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import META, Tokenizer
from pipeline.masks import get_policy
from pipeline.model.starting_point import StartingPoint
from pipeline.serving.export_config import CONFIG, ExportConfig
from pipeline.serving.hf_files import write_json

_OURS_ALONE = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Keys of a language model's config that training sets to None; exports keep the original ones."""


def check_vlm(export_config: ExportConfig, tokenizer: Tokenizer, *, prefill_causal: bool) -> StartingPoint:
    """Return the starting point of a model that its stock class computes.

    Raises UserError naming what the stock class lacks; where it prefills otherwise than training also without
    ``prefill_causal``.
    """
    spec = export_config.spec
    if spec.start is None:
        raise UserError("--format hf-vlm: the run did not start from an existing model (model.source): use --format hf")
    start, policy = spec.start, get_policy(export_config.policy, allow_leak=True, grid=spec.mask_grid)
    problems = {
        "gates (model.gate)": spec.gate.kind != "none",
        "images of several tiles (media)": spec.media is not None,
        f"positions of policy '{policy.name}'": policy.grid is not None,
        f"image token {tokenizer.markers.reserved[tokenizer.image_id]}": tokenizer.image_id
        != start.family.image_id(start.config),
    }
    if missing := [name for name, found in problems.items() if found]:
        raise UserError(f"--format hf-vlm: {start.family.model_class} has no {missing[0]}: use --format hf")
    if prefills_otherwise(export_config) and not prefill_causal:
        raise UserError(
            f"--format hf-vlm: the model was trained under policy '{policy.name}', but {start.family.model_class} "
            f"runs prompts under '{start.family.stock_policy}', so its answers would differ: use --format hf, or add "
            "--prefill-causal to accept that"
        )
    return start


def prefills_otherwise(export_config: ExportConfig) -> bool:
    """Return whether the stock class runs prompts under another mask than training did."""
    policy = get_policy(export_config.policy, allow_leak=True, grid=export_config.spec.mask_grid)
    start = export_config.spec.start
    return start is not None and policy.name != start.family.stock_policy


def write_vlm_files(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write everything but weights: the original configs with what training changed, processor and tokenizer."""
    raw, spec = export_config.to_config(), export_config.spec
    assert spec.start is not None
    theirs = spec.start.config
    text = dict(theirs.get("text_config") or {})
    config: dict[str, Any] = {
        **theirs,
        "text_config": {**text, **raw["text_config"], **{key: text[key] for key in _OURS_ALONE if key in text}},
        "vision_config": {**(theirs.get("vision_config") or {}), **raw["vision_config"]},
        "architectures": [spec.start.family.model_class],
        "dtype": export_config.dtype,
        "tie_word_embeddings": spec.tied,
        "mma": raw["mma"],
    }
    write_json(folder / CONFIG, config)
    for name, content in spec.start.files_for(spec.preprocess.size_px).items():
        write_json(folder / name, content)
    tokenizer.save(folder)
    (folder / META).unlink()
    tokenizer.save(folder / export_config.tokenizer)
    ends = {"eos_token_id": list(export_config.eos_ids), "pad_token_id": export_config.pad_id, "do_sample": False}
    write_json(folder / "generation_config.json", ends)
