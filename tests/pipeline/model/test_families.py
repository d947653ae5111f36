"""Configs from anywhere: nothing in them runs or fetches code, and every number is bounded."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from data_prep.common.errors import UserError
from pipeline.config.schema import ConfigError, ConnectorConfig, ModelConfig
from pipeline.model.connectors import read_connector
from pipeline.model.families.configs import FORBIDDEN, Family, config_keys
from pipeline.model.families.registry import LLM_FAMILIES, VISION_FAMILIES
from pipeline.model.limits import LIMITS, MAX_CONFIG_BYTES
from pipeline.model.spec import ModelSpec
from tests.pipeline.model.helpers import IMAGE_TOKENS, VOCAB, model_config, tiny_spec, whole_stage

EVIL = {
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "auto_map": {"AutoConfig": "evil.Config"},
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "evil.py"}},
    "code_revision": "main",
    "quantization_config": {"quant_method": "bitsandbytes"},
    "use_kernels": True,
    "kernel_config": {"x": 1},
}


def resolved(config: ModelConfig) -> ModelSpec:
    return ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)


def edited(part: str, **changes: Any) -> ModelConfig:
    raw = model_config().model_dump()
    into = raw[part] if part == "connector" else raw[part]["config"]
    into.update(changes)
    return ModelConfig.model_validate(raw)


def from_folder(part: str, folder: Path, **changes: Any) -> ModelConfig:
    raw = model_config().model_dump()
    (folder / "config.json").write_text(json.dumps({**raw[part]["config"], **changes}))
    raw[part] = {"source": str(folder)}
    return ModelConfig.model_validate(raw)


@pytest.mark.parametrize("family", [*LLM_FAMILIES.values(), *VISION_FAMILIES.values()], ids=repr)
def test_a_family_sets_only_its_own_keys(family: Family) -> None:
    keys = config_keys(family)
    assert {"hidden_size", "num_hidden_layers", "model_type"} <= keys
    assert not keys & (set(FORBIDDEN) | {field.name for field in fields(PreTrainedConfig)})


def test_a_tower_without_layers_is_a_patch_embedding() -> None:
    spec = resolved(edited("vision", num_hidden_layers=0))
    tower, vision = spec.towers["vision"], whole_stage(spec).vision
    pixels = torch.rand(2, 3, tower.preprocess.size_px, tower.preprocess.size_px)
    expected = vision.post_layernorm(vision.embeddings(pixels))
    assert torch.equal(tower.family.features(vision, tower.config, pixels), expected)


@pytest.mark.parametrize("part", ["llm", "vision"])
@pytest.mark.parametrize("key", EVIL)
def test_a_recipe_cannot_name_code(key: str, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{part}\.config: the key '{key}' is refused: .*; remove it"):
        resolved(edited(part, **{key: EVIL[key]}))


@pytest.mark.parametrize("part", ["llm", "vision"])
@pytest.mark.parametrize("key", EVIL)
def test_a_saved_model_cannot_name_code(key: str, part: str) -> None:
    raw = tiny_spec("llama").to_dict()
    raw[part][key] = EVIL[key]
    with pytest.raises(ConfigError, match=f"saved model: the key '{key}' is refused"):
        ModelSpec.from_dict(raw)


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_code_named_in_a_model_folder_is_ignored_with_a_warning(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evil = {key: value for key, value in EVIL.items() if key != "quantization_config"}
    plain = resolved(model_config())
    with caplog.at_level(logging.WARNING):
        spec = resolved(from_folder(part, tmp_path, **evil, output_attentions=True, surprise=1))
    assert spec.to_dict() == plain.to_dict()
    assert all(key in caplog.text for key in evil) and "config.json: ignored" in caplog.text
    config = getattr(spec, part)
    assert config._attn_implementation in (None, "sdpa") and not hasattr(config, "auto_map")
    spec.meta_llm()
    spec.towers["vision"].meta()


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: the key 'quantization_config' is refused: only plain"):
        resolved(from_folder("llm", tmp_path, quantization_config={"quant_method": "fp8"}))


ABSURD: dict[str, Callable[[Path], Any]] = {
    "layers": lambda _: resolved(edited("llm", num_hidden_layers=10**9)),
    "float-layers": lambda _: resolved(edited("llm", num_hidden_layers=1e9)),
    "tower-layers": lambda _: resolved(edited("vision", num_hidden_layers=10**9)),
    "vocabulary": lambda _: resolved(edited("llm", vocab_size=2 * 10**9)),
    "digits": lambda _: resolved(edited("llm", vocab_size=10**5000)),
    "word": lambda _: resolved(edited("llm", vocab_size="many")),
    "negative": lambda _: resolved(edited("llm", hidden_size=-64)),
    "no-layers": lambda _: resolved(edited("llm", num_hidden_layers=0)),
    "infinite": lambda _: resolved(edited("llm", rope_theta=float("inf"))),
    "nan": lambda _: resolved(edited("llm", rms_norm_eps=float("nan"))),
    "rope": lambda _: resolved(edited("llm", rope_scaling={"rope_type": "yarn", "factor": 1e300})),
    "list": lambda _: resolved(edited("llm", rope_scaling={"long_factor": [1.0] * 10**6})),
    "activation": lambda _: resolved(edited("llm", hidden_act="x" * 10**6)),
    "unknown-activation": lambda _: resolved(edited("llm", hidden_act="nope")).meta_llm(),
    "image": lambda _: resolved(edited("vision", image_size=10**9)),
    "latents": lambda _: resolved(edited("connector", latents=10**9)),
    "depth": lambda _: resolved(edited("connector", depth=10**9)),
    "folder-layers": lambda folder: resolved(from_folder("llm", folder, num_hidden_layers=10**9)),
    "folder-digits": lambda folder: resolved(raw_folder(folder, f'{{"model_type": "llama", "x": {"9" * 6000}}}')),
    "folder-deep": lambda folder: resolved(raw_folder(folder, "[" * 10**6)),
    "folder-large": lambda folder: resolved(raw_folder(folder, " " * (MAX_CONFIG_BYTES + 1))),
    "folder-binary": lambda folder: resolved(raw_folder(folder, "\x00\x01")),
    "saved-layers": lambda _: ModelSpec.from_dict(saved_with("llm", num_hidden_layers=10**9)),
    "saved-depth": lambda _: ModelSpec.from_dict(saved_with("connector", depth=10**9)),
    "saved-pixels": lambda _: ModelSpec.from_dict(saved_with("preprocess", size_px=10**9)),
    "saved-tokens": lambda _: ModelSpec.from_dict({**tiny_spec("llama").to_dict(), "image_tokens": 10**9}),
}


def raw_folder(folder: Path, text: str) -> ModelConfig:
    (folder / "config.json").write_text(text)
    return ModelConfig.model_validate({**model_config().model_dump(), "llm": {"source": str(folder)}})


def saved_with(part: str, **changes: Any) -> dict[str, Any]:
    raw = tiny_spec("llama").to_dict()
    return {**raw, part: {**raw[part], **changes}}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_values_are_one_line_at_once(case: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        ABSURD[case](tmp_path)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_limits_leave_room_for_published_models() -> None:
    largest = {  # Llama 3.1 405B, Gemma 3, SigLIP 2 naflex
        "num_hidden_layers": 126,
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_attention_heads": 128,
        "vocab_size": 262_208,
        "image_size": 1_024,
    }
    assert all(LIMITS[name] >= 4 * size for name, size in largest.items())
    read_connector(ConnectorConfig(kind="perceiver", latents=4 * 729))


ROOT = Path(__file__).parents[3]
ASKS = re.compile(r"(model_type|family)\s*(==|!=|in \(|in \{|in \[|\.startswith)")


def test_no_code_outside_a_family_asks_which_family_it_is() -> None:
    """What is special about a family is in its descriptor, so that a new family is one file."""
    questions = ("pipeline/serving/evaluate.py", "pipeline/training/evaluation.py")  # have families of questions
    others = ("pipeline/model/families", *questions)
    sources = [path for path in ROOT.glob("pipeline/**/*.py") if not str(path.relative_to(ROOT)).startswith(others)]
    asking = [f"{path}: {line.strip()}" for path in sources for line in path.open() if ASKS.search(line)]
    assert len(sources) > 100 and not asking
