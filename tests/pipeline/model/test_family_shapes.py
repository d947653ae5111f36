"""Families at their published sizes on the meta device, their towers and folders against transformers, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, Gemma3Config, Gemma3ForConditionalGeneration

from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.model.counts import ParamCounts
from pipeline.model.families.registry import LLM_FAMILIES, VISION_FAMILIES
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import WeightSource, global_shapes
from tests.pipeline.model.helpers import (
    FAMILY_KEYS,
    IMAGE_TOKENS,
    LLM,
    SIDE,
    TOWER,
    VISION_KEYS,
    VOCAB,
    model_config,
    tiny_spec,
    whole_stage,
)

GEMMA3 = {"head_dim": 256, "sliding_window": 1024, "max_position_embeddings": 131072, "vocab_size": 262208}
DECODERS: dict[str, tuple[dict[str, Any], int]] = {
    "mistral-7b": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}, 7_241_732_096,
    ),
    "mistral-small-24b": (
        {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
         "sliding_window": None}, 23_572_403_200,
    ),
    "olmo3-7b": (
        {"model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100278}, 7_298_011_136,
    ),
    "gemma3-4b": (
        {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
         "num_attention_heads": 8, "num_key_value_heads": 4, **GEMMA3}, 3_880_263_168,
    ),
    "gemma4-31b": (
        {"model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
         "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512,
         "num_global_key_value_heads": 4, "attention_k_eq_v": True, "sliding_window": 1024,
         "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, "vocab_size": 262144}, 0,
    ),
}  # fmt: skip
"""Published configs of decoders, and their parameters where they are published; 0: compared with transformers only."""
TOWERS: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "siglip2-so400m-384": (
        {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
         "num_attention_heads": 16, "image_size": 384, "patch_size": 14}, (27, 27), 0,
    ),
    "siglip2-giant-384": (
        {"model_type": "siglip_vision_model", "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40,
         "num_attention_heads": 16, "image_size": 384, "patch_size": 16}, (24, 24), 0,
    ),
    "dinov2-large": (
        {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "image_size": 518, "patch_size": 14}, (37, 37), 304_368_640 - 1024,
    ),
    "dinov2-giant": (
        {"model_type": "dinov2", "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
         "image_size": 518, "patch_size": 14, "use_swiglu_ffn": True}, (37, 37), 1_136_480_768 - 1536,
    ),
    "dinov2-registers-large": (
        {"model_type": "dinov2_with_registers", "hidden_size": 1024, "num_hidden_layers": 24,
         "num_attention_heads": 16, "image_size": 518, "patch_size": 14}, (37, 37), 304_372_736 - 1024,
    ),
}  # fmt: skip
"""Published configs of towers, their grid, and their parameters where they are published, less the mask token."""


def stock(config: Any, *, decoder: bool) -> int:
    """Count the parameters of transformers' own class, with buffers that it saves as parameters are here."""
    family = (LLM_FAMILIES if decoder else VISION_FAMILIES)[config.model_type]
    with torch.device("meta"):
        model = family.model_class(type(config).from_dict(config.to_dict()))
    return sum(param.numel() for param in model.parameters()) + sum(
        value.numel() for name, value in model.state_dict().items() if name.endswith("layer_scalar")
    )


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_parameters_of_its_published_size(name: str) -> None:
    config, published = DECODERS[name]
    spec = ModelSpec.resolve(_with(llm=config), vocab_size=9, image_tokens=IMAGE_TOKENS)
    counts = ParamCounts.of(spec)
    own = counts.total - counts.vision - counts.connector
    assert own == stock(spec.llm, decoder=True)
    assert not published or own == published


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_the_parameters_of_its_published_size(name: str) -> None:
    config, grid, published = TOWERS[name]
    spec = ModelSpec.resolve(_with(vision=config), vocab_size=9, image_tokens=IMAGE_TOKENS)
    vision = ParamCounts.of(spec).vision
    unused = config["hidden_size"] if "registers" in name else 0  # its config cannot leave out the mask token
    assert spec.grid == grid and vision == stock(spec.vision, decoder=False) - unused
    assert not published or vision == published


def _with(**parts: dict[str, Any]) -> ModelConfig:
    raw = model_config().model_dump()
    return ModelConfig.model_validate(raw | {part: {"config": config} for part, config in parts.items()})


# ---- towers against transformers


@pytest.mark.parametrize("side", [SIDE, 3 * SIDE // 2])
@pytest.mark.parametrize("vision", VISION_KEYS)
def test_patch_features_are_those_of_the_stock_tower(vision: str, side: int) -> None:
    spec = tiny_spec(vision=vision)
    stage = whole_stage(spec)
    own = AutoModel.from_config(type(spec.vision).from_dict(spec.vision.to_dict())).eval()
    missing, unexpected = own.load_state_dict(stage.vision.state_dict(), strict=False)
    assert not unexpected and all("mask_token" in name or "post_layernorm" in name for name in missing)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    options = {} if vision.startswith("dino") or side == SIDE else {"interpolate_pos_encoding": True}
    family = spec.vision_family
    with torch.no_grad():
        mine = family.features(stage.vision, spec.vision, pixels)
        theirs = own(pixel_values=pixels, **options).last_hidden_state[:, family.extra_tokens(spec.vision) :]
    assert mine.shape == (2, (side // 8) ** 2, 24) and torch.equal(mine, theirs)


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_published_dinov2_folder_is_read_by_its_old_names(swiglu: bool, tmp_path: Path) -> None:
    """Transformers writes the names that published folders have; its own loader is the oracle."""
    torch.manual_seed(2)
    keys = {**TOWER, **VISION_KEYS["dinov2"], "use_swiglu_ffn": swiglu}
    Dinov2Model(Dinov2Config(**keys)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in name for name in saved)
    assert any("mlp.weights_in" in name for name in saved) == swiglu
    spec = ModelSpec.resolve(_from(vision=tmp_path), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    stage = whole_stage(spec, source=WeightSource.open(spec))
    theirs = dict(Dinov2Model.from_pretrained(tmp_path).named_parameters())
    for name, param in stage.vision.named_parameters():
        assert torch.equal(param, theirs[name]), name


def _from(**folders: Path) -> ModelConfig:
    raw = model_config().model_dump()
    return ModelConfig.model_validate(raw | {part: {"source": str(folder)} for part, folder in folders.items()})


@pytest.mark.parametrize("vision", VISION_KEYS)
def test_another_image_size_interpolates_positions(vision: str) -> None:
    raw = model_config(vision=vision).model_dump()
    raw["vision"]["size_px"], raw["connector"] = 3 * SIDE // 2, {"kind": "mlp"}
    spec = ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=9)
    assert spec.grid == spec.mask_grid == (3, 3)
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.to_dict() == spec.to_dict() and again.grid == (3, 3)
    assert whole_stage(spec).image_tokens(None, torch.zeros(1)).shape == (9, 32)
    raw["vision"]["size_px"] = 7
    with pytest.raises(ConfigError, match=r"model\.vision\.size_px=7: give at least one patch"):
        ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=9)


# ---- decoders out of multimodal folders


@pytest.mark.parametrize("old_names", [False, True])
def test_the_decoder_of_a_multimodal_gemma_is_read(old_names: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    text = {**LLM, **FAMILY_KEYS["gemma3_text"]}
    vision = {**TOWER, **VISION_KEYS["siglip_vision_model"]}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    whole.save_pretrained(tmp_path)
    if old_names:  # as on the Hub
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("model.language_model.", "language_model.model."): x for name, x in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    spec = ModelSpec.resolve(_from(llm=tmp_path), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert spec.llm.model_type == "gemma3_text" and spec.llm.final_logit_softcapping == 15.0
    stage = whole_stage(spec, source=WeightSource.open(spec))
    theirs = dict(whole.model.language_model.named_parameters())
    for name, _ in global_shapes(spec):
        if name.startswith("model."):
            assert torch.equal(stage.get_parameter(name), theirs[name.removeprefix("model.")]), name


# ---- Gemma 4's constants


def test_gemma_4s_factors_are_loaded_but_not_trained(tmp_path: Path) -> None:
    stage = whole_stage(tiny_spec("gemma4_text"))
    name = "model.layers.1.layer_scalar"
    assert not stage.get_parameter(name).requires_grad and stage.get_parameter(name).item() == 1.0
    own = stage.spec.llm_family.model_class(stage.spec.llm)
    own.model.layers[1].layer_scalar.fill_(0.25)
    own.save_pretrained(tmp_path)
    spec = ModelSpec.resolve(_from(llm=tmp_path), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    loaded = whole_stage(spec, source=WeightSource.open(spec))
    assert loaded.get_parameter(name).item() == 0.25 and not loaded.get_parameter(name).requires_grad
    assert spec.head_size == 16 and ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).head_size == 16


# ---- refusals

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sinks": ("llm", {"model_type": "gpt_oss"}, "learned sinks"),
    "experts": ("llm", {"model_type": "qwen3_moe"}, "mixture of experts"),
    "per-layer-inputs": (
        "llm", {"model_type": "gemma4_text", "hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input=8: every",
    ),
    "shared-keys": (
        "llm", {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1,
                "layer_types": ["full_attention"] * 3}, "num_kv_shared_layers=1: the last layers",
    ),
    "gemma4-experts": (
        "llm", {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "enable_moe_block": True,
                "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}, "enable_moe_block: mixtures",
    ),
    "encoder": ("llm", {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "makes an encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_refused_with_the_reason(case: str) -> None:
    part, config, words = REFUSED[case]
    base = {**LLM, "head_dim": 8} if part == "llm" else {**TOWER}
    with pytest.raises(ConfigError, match=words) as caught:
        ModelSpec.resolve(_with(**{part: {**base, **config}}), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert "\n" not in str(caught.value)
