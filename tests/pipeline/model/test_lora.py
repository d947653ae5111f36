"""Layers with adapters: what they compute, which layers have one, how they start, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from data_prep.common.errors import UserError
from pipeline.config.schema import LoraConfig, ModelConfig
from pipeline.model import lora
from pipeline.model.build import build_stage
from pipeline.model.counts import ParamCounts
from pipeline.model.lora import LoraLinear, is_adapter
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import parameter_shapes
from tests.pipeline.model.helpers import IMAGE_TOKENS, VOCAB, model_config, whole_stage


def spec_of(family: str = "llama", **lora_keys: Any) -> ModelSpec:
    raw = {**model_config(family).model_dump(), "lora": {"rank": 2, **lora_keys}}
    return ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)


@pytest.mark.parametrize(("rslora", "factor"), [(False, 3.0), (True, 6.0)])
def test_a_layer_adds_its_update(rslora: bool, factor: float) -> None:
    config = LoraConfig(rank=4, alpha=12.0, rslora=rslora)
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, config).to_empty(device="cpu")
    for param in layer.parameters():
        nn.init.normal_(param)
    x = torch.randn(3, 6)
    update = layer.lora_B.weight @ layer.lora_A.weight
    expected = x @ (layer.weight + factor * update).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    whole = lora.merged_update(layer.lora_A.weight, layer.lora_B.weight, config)
    assert torch.allclose(whole, factor * update, atol=1e-5)
    assert torch.equal(lora.merged_update(layer.lora_A.weight, layer.lora_B.weight[1:3], config), whole[1:3])


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "granite"])
def test_the_default_is_every_linear_layer_of_the_decoder_and_starts_without_effect(family: str) -> None:
    spec = spec_of(family)
    plain = whole_stage(ModelSpec.from_dict({**spec.to_dict(), "lora": None}))
    adapted = whole_stage(spec)
    wanted = {name for name, module in plain.model.named_modules(prefix="model") if isinstance(module, nn.Linear)}
    assert spec.lora is not None and set(spec.lora.targets) == wanted
    mine, theirs = adapted.state_dict(), plain.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items()), "the base is drawn as without LoRA"
    assert {name for name in mine if name not in theirs} == {
        f"{name}.{own}" for name in wanted for own in (lora.A, lora.B)
    }
    x = torch.randn(7, spec.width)
    name = next(name for name in sorted(wanted) if name.endswith(("q_proj", "qkv_proj")))
    assert torch.equal(adapted.get_submodule(name)(x), plain.get_submodule(name)(x))
    assert {name: tuple(param.shape) for name, param in adapted.named_parameters()} == dict(parameter_shapes(spec))
    assert ModelSpec.from_dict(spec.to_dict()).lora == spec.lora


def test_adapters_start_equal_in_every_split_and_type() -> None:
    spec = spec_of(targets=["q_proj"])
    whole = whole_stage(spec).state_dict()
    last = build_stage(
        spec, layers=[2], first=False, last=True, dtype=torch.bfloat16, device="cpu", seed=3, reads=False
    ).state_dict()  # fmt: skip
    name = f"model.layers.2.self_attn.q_proj.{lora.A}"
    assert whole[name].abs().max() > 0 and torch.equal(last[name], whole[name].bfloat16())
    assert not torch.equal(whole[name], whole[name.replace("layers.2", "layers.1")])


def test_names_and_patterns_are_targets() -> None:
    targets = spec_of(targets=["o_proj", "vision.*.fc1", "model.layers.0.mlp.up_proj"]).lora
    assert targets is not None and set(targets.targets) == {
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(3)), "model.layers.0.mlp.up_proj",
        *(f"vision.encoder.layers.{i}.mlp.fc1" for i in range(2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"targets": ["q_prj"]}, r"model.lora.targets: 'q_prj' matches no linear layer \(did you mean 'q_proj'\?\)"),
        ({"targets": ["lm_head"]}, r"'lm_head' matches no linear layer"),
        ({"quantization": "nf4"}, r"model.lora.quantization=nf4 needs bitsandbytes, which is not installed: set it to"),
    ],
)
def test_what_cannot_be_adapted_is_refused(keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        spec_of(**keys)


def test_dropout_and_empty_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout=0\.1 is not supported"):
        LoraConfig(rank=2, dropout=0.1)
    with pytest.raises(ValueError, match="targets is empty"):
        LoraConfig(rank=2, targets=[])


def test_quantized_weights_are_refused_where_bitsandbytes_is_installed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="quantization=int8 is not supported"):
        spec_of(quantization="int8")


def test_only_adapters_and_connector_are_counted_as_trained() -> None:
    spec = spec_of()
    counts = ParamCounts.of(spec)
    adapters = sum(torch.Size(shape).numel() for name, shape in parameter_shapes(spec) if is_adapter(name))
    assert counts.trained.total == adapters + counts.connector
    assert sum(counts.trained.layers) == adapters and counts.trained.embed == counts.trained.head == 0
    full, mine = (
        ParamCounts.of(each).part_costs(image_share=0.1, target_share=0.3, recomputed=False)[1]
        for each in (ModelSpec.from_dict({**spec.to_dict(), "lora": None}), spec)
    )
    assert 0.5 < mine.backward / full.backward < 0.75, "gradients of inputs, and of few weights"
