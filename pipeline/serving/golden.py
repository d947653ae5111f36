"""Golden logits of an export: what the training code computes for a few prompts, so any loader can be checked.

``golden.safetensors`` holds prompts, pictures and logits, computed in float32 from the exported weights, one decoder
layer in memory at a time. Beside the logits under the training mask stand those under a causal mask, so a check can
tell whether a loader ran causal, and whether the prompts tell the two apart at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import check_format
from data_prep.example import ImageRef, Turn
from data_prep.images.store import decode_rgb
from data_prep.text.tokenizer import Tokenizer
from pipeline.masks import get_policy
from pipeline.model.build import build_stage
from pipeline.model.inputs import StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import WeightSource
from pipeline.serving.export_config import ExportConfig
from pipeline.serving.prompt import Prompt, stage_inputs

GOLDEN = "golden.safetensors"
FORMAT, VERSION = "mma-golden", 1
POSITIONS = 8
"""Logits kept for each prompt: of this many text tokens, the last one included."""
TOLERANCE = 2e-4
"""Largest difference in float32, relative to the largest golden logit; other kernels add in another order."""


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt with its logits."""

    turns: tuple[Turn, ...]
    input_ids: torch.Tensor
    """int64[T]."""
    generated: torch.Tensor
    """int64[T]."""
    pixel_values: torch.Tensor | None
    """float32[n, 3, S, S]; None without pictures."""
    positions: torch.Tensor
    """int64[p], ascending; the last one predicts the answer's first token."""
    logits: torch.Tensor
    """float32[p, V] under the training mask."""
    causal_logits: torch.Tensor
    """float32[p, V] under a causal mask."""


def golden_turns(*, documents: bool = False) -> list[tuple[Turn, ...]]:
    """Return the conversations of golden prompts; ``documents``: for a template without turns."""
    first, second = _picture(0), _picture(1)
    asked = (Turn("user", (first, "What is shown in this picture?")),)
    if documents:
        return [(Turn("user", (first,)),), (Turn("user", (second, "A picture of")),)]
    history = (
        Turn("user", (first, "What colour is it?")), Turn("assistant", ("Red.",)),
        Turn("user", (second, "Is this one larger?")),
    )  # fmt: skip
    return [asked, history, (Turn("user", ("Say one word.",)),)]


def _picture(number: int) -> ImageRef:
    """Draw a disc on a slope of colours, 96 x 64 pixels."""
    y, x = np.mgrid[0:64, 0:96]
    pixels = np.stack([2 * x, 3 * y, np.full_like(x, 90 + 60 * number)], axis=-1).clip(0, 255).astype(np.uint8)
    pixels[(y - 32) ** 2 + (x - 30 - 30 * number) ** 2 < (12 + 8 * number) ** 2] = (220, 40 + 150 * number, 30)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return ImageRef(f"golden picture {number}", data=data.getvalue())


def write_golden(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Compute and write the golden logits of an export whose weights are written.

    Raises UserError when no prompt fits the model's positions.
    """
    spec = export_config.spec
    policy = get_policy(export_config.policy, allow_leak=True, grid=spec.mask_grid)
    chosen = _fitting(export_config, tokenizer)
    masks = (policy, get_policy("causal"))
    inputs = [stage_inputs(spec, policy, prompt, mask=mask) for mask in masks for _, prompt in chosen]
    logits = streamed_logits(spec, WeightSource.open_export(spec, folder), inputs)
    tensors: dict[str, torch.Tensor] = {}
    for number, (_, prompt) in enumerate(chosen):
        ids = torch.from_numpy(prompt.encoded.ids.astype(np.int64))
        text = (torch.from_numpy(prompt.encoded.modality.astype(np.int64)) == 0).nonzero().squeeze(1)
        kept = text[torch.linspace(0, len(text) - 1, min(POSITIONS, len(text))).round().long()]
        columns = {
            "input_ids": ids,
            "generated": torch.from_numpy(prompt.encoded.generated.astype(np.int64)),
            "positions": kept,
            "logits": logits[number][kept].contiguous(),
            "causal_logits": logits[len(chosen) + number][kept].contiguous(),
        }
        if (pixels := inputs[number].pixels) is not None:
            columns["pixel_values"] = pixels
        tensors |= {f"{number}.{name}": column for name, column in columns.items()}
    about = {"format": FORMAT, "version": VERSION, "policy": policy.name, "prompts": [_to_json(t) for t, _ in chosen]}
    save_file(tensors, folder / GOLDEN, metadata={"golden": json.dumps(about)})


def _fitting(export_config: ExportConfig, tokenizer: Tokenizer) -> list[tuple[tuple[Turn, ...], Prompt]]:
    spec, template = export_config.spec, export_config.template
    limits = [x for x in (spec.longest_segment, spec.llm_family.sliding_window(spec.llm)) if x is not None]
    found = []
    for turns in golden_turns(documents=template.chat_format is None):
        pictures = [decode_rgb(part.read()) for turn in turns for part in turn.parts if not isinstance(part, str)]
        tokens = [extent.tokens for extent in spec.extents(picture.size for picture in pictures)]
        encoded = tokenizer.encode(template.prompt_pieces(turns), tokens)
        if len(encoded) <= min(limits, default=len(encoded)):
            found.append((turns, Prompt(encoded, tuple(pictures))))
    if not any(prompt.images for _, prompt in found):
        raise UserError(
            f"{spec.media_spec.image.describe()}, and no prompt with one fits the model's {min(limits)} "
            "positions: export a model that can be asked about an image"
        )
    return found


@torch.inference_mode()
def streamed_logits(spec: ModelSpec, source: WeightSource, inputs: Sequence[StageInputs]) -> list[torch.Tensor]:
    """Return the logits [T, V] of each input in float32 on the CPU, with one decoder layer in memory at a time."""
    hidden: list[torch.Tensor] = []
    for layer in range(spec.layers):
        first, last = layer == 0, layer == spec.layers - 1
        stage = build_stage(
            spec, layers=[layer], first=first, last=last, dtype=torch.float32, device="cpu", seed=0, source=source
        ).eval()
        hidden = [stage.embed(one) for one in inputs] if first else hidden
        hidden = [stage.decode(states, one) for states, one in zip(hidden, inputs, strict=True)]
        if last:
            return [stage.lm_head.logits(stage.model.norm(states))[0] for states in hidden]
    raise AssertionError("a model has at least one layer")


def read_golden(folder: Path) -> list[GoldenPrompt]:
    """Read an export's golden prompts. Raises UserError when the file is missing, damaged or of another version."""
    path, fix = folder / GOLDEN, "export the run again"
    if not path.is_file():
        raise UserError(f"{path} is missing: {fix}; exports of earlier releases have none")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["golden"])
            check_format(path, about, format=FORMAT, version=VERSION, fix=fix)
            return [_prompt(file, number, raw) for number, raw in enumerate(about["prompts"])]
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {fix}") from error


def _prompt(file: Any, number: int, raw: Any) -> GoldenPrompt:
    names = set(file.keys())
    columns = ("input_ids", "generated", "positions", "logits", "causal_logits")
    read = {name: file.get_tensor(f"{number}.{name}") for name in columns}
    pixels = file.get_tensor(f"{number}.pixel_values") if f"{number}.pixel_values" in names else None
    return GoldenPrompt(turns=_from_json(raw), pixel_values=pixels, **read)


def _to_json(turns: Sequence[Turn]) -> list[Any]:
    def written(part: str | ImageRef) -> str | dict[str, int]:
        return part if isinstance(part, str) else {"picture": int(part.name[-1])}

    return [[turn.role, [written(part) for part in turn.parts]] for turn in turns]


def _from_json(raw: Any) -> tuple[Turn, ...]:
    return tuple(
        Turn(role, tuple(part if isinstance(part, str) else _picture(int(part["picture"])) for part in parts))
        for role, parts in raw
    )
