"""Tiny exports of any family, conversations with drawn images."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.example import ImageRef, Turn
from data_prep.text.template import Template
from data_prep.text.tokenizer import Tokenizer, train_sentencepiece
from pipeline.config.schema import ConnectorConfig, GateConfig, ModelConfig
from pipeline.model.export_files import write_file_hashes
from pipeline.model.export_names import exported_name
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import global_shapes
from pipeline.serving.export import export
from tests.pipeline.model.helpers import IMAGE_TOKENS, SIDE, VISION, model_config, opened, whole_stage

WORDS = [
    "what colour is the circle",
    "how many squares are there",
    "red green blue yellow",
    "one two three four",
    "left",
]
TEMPLATE = Template("plain")
GRID_TOKENS = (SIDE // int(VISION["patch_size"])) ** 2


@dataclass(frozen=True)
class Saved:
    """A checkpoint as the exporter sees it."""

    stage: Stage
    meta: dict[str, Any]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, param.detach()) for name, param in self.stage.named_parameters())


def make_tokenizer(folder: Path) -> Tokenizer:
    train_sentencepiece(WORDS, 400, TEMPLATE.specials, folder / "tokenizer.model")
    tokenizer = Tokenizer.open(folder / "tokenizer.model", TEMPLATE.specials)
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def make_saved(
    folder: Path,
    family: str = "llama",
    *,
    policy: str = "mma",
    connector: dict[str, Any] | None = None,
    patch_tokens: bool = False,
    extra_vision: list[dict[str, Any]] | None = None,
    gate: GateConfig | None = None,
    vision: str = "siglip_vision_model",
    **llm: Any,
) -> Saved:
    """Make a random model; ``patch_tokens`` gives it one token per patch, on a grid, ``gate`` strong gates."""
    tokenizer = make_tokenizer(folder)
    config = model_config(family, vision=vision, **llm)
    image_tokens: int | None = IMAGE_TOKENS
    if patch_tokens:
        config, image_tokens = config.model_copy(update={"connector": ConnectorConfig(kind="mlp")}), GRID_TOKENS
    if connector is not None:
        own = {"connector": connector, "extra_vision": extra_vision or []}
        config, image_tokens = ModelConfig.model_validate({**config.model_dump(), **own}), None
    if gate is not None:
        config = config.model_copy(update={"gate": gate})
    spec = ModelSpec.resolve(config, vocab_size=len(tokenizer), image_tokens=image_tokens)
    meta = {
        "spec": spec.to_dict(),
        "policy": policy,
        "template": asdict(TEMPLATE),
        "image_id": tokenizer.image_id,
        "pad_id": tokenizer.pad_id,
        "eos_ids": [tokenizer.id_of(name) for name in TEMPLATE.ends],
        "tokenizer": str(folder / "tokenizer"),
        "dtype": "float32",
    }
    return Saved(opened(whole_stage(spec)), meta)


def make_export(folder: Path, family: str = "llama", **options: Any) -> Path:
    return export(make_saved(folder, family, **options), folder / "export")


def flat_layout(folder: Path, out: Path) -> Path:
    """Rewrite an export as earlier releases wrote them: global names, the language model's config."""
    shutil.copytree(
        folder,
        out,
        ignore=lambda _, names: [name for name in names if name.endswith((".py", ".jinja", "golden.safetensors"))],
    )
    raw = json.loads((out / "config.json").read_text())
    spec = {**raw["mma"]["spec"], "llm": raw["text_config"], "vision": raw["vision_config"]}
    own = {**raw["mma"], "version": 3, "spec": spec}
    (out / "config.json").write_text(json.dumps({**raw["text_config"], "mma": own}))
    index = out / "model.safetensors.index.json"
    names = {exported_name(name, "hf"): name for name, _ in global_shapes(ModelSpec.from_dict(spec))}
    for path in out.glob("model-*.safetensors"):
        save_file({names[name]: tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    weight_map = {names[name]: file for name, file in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    write_file_hashes(out)
    return out


def picture(seed: int) -> ImageRef:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (20 + seed, 24, 3), generator=generator, dtype=torch.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG")
    return ImageRef(f"picture {seed}", data=data.getvalue())


def user(*parts: str | ImageRef) -> Turn:
    return Turn("user", tuple(parts))


def assistant(text: str) -> Turn:
    return Turn("assistant", (text,))


CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    (
        user(picture(1), "what colour is the circle"),
        assistant("red"),
        user("how many squares are there", picture(2)),
        assistant("two"),
        user("what colour is the left"),
    ),
    (user(picture(3), picture(4), "how many squares are there"),),
    (user("one two three"),),
    (Turn("system", ("one",)), user("what colour", picture(5)), assistant("blue"), user("how many")),
)


def relabel(turns: tuple[Turn, ...], text: str) -> tuple[Turn, ...]:
    """The same conversation with another last question."""
    return (*turns[:-1], replace(turns[-1], parts=(text,)))
