"""Existing vision-language models as starting points: their logits, weights and configs in this project's stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from data_prep.vlms import VLMS
from pipeline.attention import build_plan
from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.masks import Sidecars, parse_layout, position_ids
from pipeline.model.build import build_stage
from pipeline.model.export_names import vlm_name
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource, global_shapes
from tests.pipeline.model.vlms import SIDE, TINY

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llava-1.5-7b": ({
        "model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                        "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                          "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                          "projection_dim": 768},
    }, 576),
    "gemma-3-4b": ({
        "model_type": "gemma3", "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896,
                          "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
                          "patch_size": 14, "vision_use_head": False},
    }, 256),
    "idefics3-8b": ({
        "model_type": "idefics3", "image_token_id": 128257, "scale_factor": 2,
        "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                        "vocab_size": 128259},
        "vision_config": {"hidden_size": 1152, "image_size": 364, "intermediate_size": 4304,
                          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
    }, 169),
    "smolvlm2-256m": ({
        "model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 4,
        "text_config": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64,
                        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                        "vocab_size": 49280},
        "vision_config": {"hidden_size": 768, "image_size": 512, "intermediate_size": 3072,
                          "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 16},
    }, 64),
    "internvl3-1b": ({
        "model_type": "internvl", "image_token_id": 151667,
        "text_config": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                        "vocab_size": 151674},
        "vision_config": {"model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096,
                          "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": [448, 448],
                          "patch_size": [14, 14], "attention_bias": True},
    }, 256),
}  # fmt: skip
"""Configs of published models, and the tokens of one square image."""
LAYOUTS = ("Q5 A3", "Q2 V4 Q3 A4", "Q2 V4 V4 Q3 A4", "Q1 V4 Q2 A2 Q3 V4 Q2 A3")


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[name].save(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def stock(name: str) -> Any:
    return TINY[name].model()


@pytest.fixture(scope="module")
def stage(folder: Path) -> Stage:
    return whole(folder)


def whole(folder: Path) -> Stage:
    spec = ModelSpec.resolve(ModelConfig(source=str(folder)), vocab_size=1, image_tokens=None)
    return build_stage(
        spec, layers=range(spec.layers), first=True, last=True, dtype=torch.float32, device="cpu", seed=0,
        source=WeightSource.open(spec),
    ).eval()  # fmt: skip


def stage_inputs(row: Sidecars, ids: torch.Tensor, pixels: torch.Tensor | None, policy: str) -> StageInputs:
    return StageInputs(
        input_ids=ids, position_ids=position_ids(row), plan=build_plan(policy, row),
        labels=torch.full_like(ids, IGNORE), image_positions=(row.modality == 1).nonzero().squeeze(1), pixels=pixels,
    )  # fmt: skip


@torch.no_grad()
def own_logits(stage: Stage, inputs: StageInputs) -> torch.Tensor:
    hidden = stage.decode(stage.embed(inputs), inputs)
    return stage.lm_head.logits(stage.model.norm(hidden))[0]


def drawn(row: Sidecars, image_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(len(row))
    ids = torch.randint(3, 200, (len(row),), generator=generator)
    ids[row.modality == 1] = image_id
    images = int((row.modality == 1).sum()) // 4
    return ids, torch.randn(images, 3, SIDE, SIDE, generator=generator) if images else None


@torch.no_grad()
def stock_logits(name: str, model: Any, ids: torch.Tensor, pixels: torch.Tensor | None, **options: Any) -> torch.Tensor:
    if pixels is not None:
        options["pixel_values"] = pixels[None] if name in ("idefics3", "smolvlm") else pixels
    logits: torch.Tensor = model(input_ids=ids[None], **options).logits[0]
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_logits_are_those_of_the_stock_class(name: str, stock: Any, stage: Stage, layout: str) -> None:
    row = parse_layout(layout)
    ids, pixels = drawn(row, stock.config.image_token_id)
    mine = own_logits(stage, stage_inputs(row, ids, pixels, "causal"))
    theirs = stock_logits(name, stock, ids, pixels)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_stock_policy_is_the_mask_of_the_stock_class(name: str, stock: Any, stage: Stage) -> None:
    policy = VLMS[name].stock_policy
    if policy == "causal":  # shown above; a mask of its own needs the token types of its processor
        return
    row = parse_layout("Q2 V4 Q2 V4 Q3")
    ids, pixels = drawn(row, stock.config.image_token_id)
    kinds = (row.modality == 1).long()[None]
    theirs = stock_logits(name, stock, ids, pixels, token_type_ids=kinds)
    mine, causal = (own_logits(stage, stage_inputs(row, ids, pixels, each)) for each in (policy, "causal"))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (causal - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_shapes_are_mapped_by_name_with_none_left_over(model: str, tmp_path: Path) -> None:
    raw, tokens = PUBLISHED[model]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    spec = ModelSpec.resolve(ModelConfig(source=str(tmp_path)), vocab_size=1, image_tokens=None)
    assert spec.start is not None and spec.image_tokens == tokens
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
    theirs = {name: tuple(value.shape) for name, value in stock.named_parameters()}  # a tied head once
    layout, family = spec.start.family.layouts[-1], spec.start.family
    assert {vlm_name(name, family, layout): shape for name, shape in global_shapes(spec)} == theirs
    assert spec.tied == bool(config.tie_word_embeddings)
    ours, stocks = spec.llm.to_dict(), config.get_text_config().to_dict()
    ignored = {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"}
    assert {key: value for key, value in ours.items() if key not in ignored and stocks.get(key) != value} == {}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "someones_vlm"])
def test_other_models_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(ConfigError, match=f"model_type '{name}' is not supported as a starting point"):
        ModelSpec.resolve(ModelConfig(source=str(tmp_path)), vocab_size=1, image_tokens=None)


def test_every_tensor_of_the_folder_is_read(stage: Stage, stock: Any) -> None:
    assert stage.spec.start is not None
    source = WeightSource.open(stage.spec)
    assert source is not None and not source.unused
    assert sum(p.numel() for p in stage.parameters()) == sum(p.numel() for p in stock.parameters())
    assert stage.spec.start.family.image_tokens(stage.spec.start.config) == stage.spec.image_tokens == 4
