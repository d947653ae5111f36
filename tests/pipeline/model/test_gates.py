"""Models with gates: zero start, packing, stages, checkpointing, and weights from before the gates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_prep.common.errors import UserError
from pipeline.attention import build_plan, gate
from pipeline.config.schema import GateConfig, LoraConfig
from pipeline.masks import Sidecars
from pipeline.model.build import build_stage
from pipeline.model.families.registry import LLM_FAMILIES
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource
from tests.pipeline.model.helpers import (
    FAMILY_KEYS,
    model_config,
    opened,
    random_sidecars,
    stage_inputs,
    tiny_spec,
    whole_stage,
)

F32, F64 = torch.float32, torch.float64
GATE = GateConfig(kind="rave_style", rank=4)
FAMILIES = [name for name in FAMILY_KEYS if LLM_FAMILIES[name].query_key is not None]


def gated(family: str = "llama", config: GateConfig = GATE, **llm: Any) -> ModelSpec:
    return replace(tiny_spec(family, **llm), gate=config)


def gradients(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in stage.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_new_gates_is_the_model_without_to_the_bit(family: str) -> None:
    plain, stage = whole_stage(tiny_spec(family)), whole_stage(gated(family))
    inputs = stage_inputs(random_sidecars(8, 3, padding=2), dtype=F32)
    before, after = plain(None, inputs), stage(None, inputs)
    assert torch.equal(before, after)
    before.backward()
    after.backward()
    mine = gradients(stage)
    assert all(torch.equal(mine[name], grad) for name, grad in gradients(plain).items())
    assert torch.equal(plain.decode(plain.embed(inputs), inputs), stage.decode(stage.embed(inputs), inputs))
    strengths = [grad for name, grad in mine.items() if name.endswith("strength")]
    assert len(strengths) == 3 and all(grad.abs().min() > 0 for grad in strengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_read_queries_and_keys_before_the_rotary_embedding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At position 0 the rotary embedding is the identity, so they are what the layer passes to its attention."""
    stage, calls = whole_stage(gated(family), dtype=F64), 0
    inputs = stage_inputs(random_sidecars(8, 3, padding=2), dtype=F64)
    inputs = replace(inputs, position_ids=torch.zeros_like(inputs.position_ids))
    widen = gate.PairGate.widen

    def check(self: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        kept = dict(self._features)
        torch.testing.assert_close(kept["query"].transpose(1, 2), q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept["key"].transpose(1, 2), k, rtol=1e-6, atol=1e-6)
        return widen(self, q, k, *rest)

    monkeypatch.setattr(gate.PairGate, "widen", check)
    stage(None, inputs)
    assert calls == 3


@pytest.mark.parametrize("config", [GATE, GateConfig(kind="rave_style", rank=3, heads="0,3")], ids=["all", "two-heads"])
def test_packed_samples_give_the_loss_and_gradients_of_samples_alone(config: GateConfig) -> None:
    stage = opened(whole_stage(gated("qwen3", config), dtype=F64))
    sidecars = Sidecars.concat([random_sidecars(seed, 1, padding=0) for seed in (1, 2, 3)])
    inputs = stage_inputs(sidecars, dtype=F64)
    loss = stage(None, inputs)
    loss.backward()
    packed = gradients(stage)
    stage.zero_grad()
    total, images = torch.zeros((), dtype=F64), 0
    for number in sidecars.segment.unique().tolist():
        own = sidecars.segment == number
        columns = {name: getattr(sidecars, name)[own] for name in ("segment", "modality", "instance", "generated")}
        count = len(columns["instance"][columns["instance"] >= 0].unique())
        columns["instance"] = torch.where(columns["instance"] >= 0, columns["instance"] - images, -1)
        alone = Sidecars(**columns)
        part = replace(
            inputs,
            input_ids=inputs.input_ids[own],
            position_ids=inputs.position_ids[own],
            labels=inputs.labels[own],
            plan=build_plan("mma", alone),
            image_positions=(alone.instance >= 0).nonzero().squeeze(1),
            pixels=inputs.pixels[images : images + count] if inputs.pixels is not None and count else None,
        )
        images += count
        total = total + stage(None, part)
    total.backward()
    assert abs(loss - total) <= 1e-12 * abs(total)
    for name, grad in gradients(stage).items():
        assert (packed[name] - grad).norm() <= 1e-10 * grad.norm().clamp(min=1e-12), name


@pytest.mark.parametrize("cuts", [(1,), (1, 2)])
def test_chained_stages_equal_one_and_checkpointing_changes_nothing(cuts: tuple[int, ...]) -> None:
    spec = gated("phi3")
    inputs = stage_inputs(random_sidecars(4, 3, padding=5), dtype=F64)
    edges = [0, *cuts, spec.layers]
    parts = [
        build_stage(
            spec, layers=range(lo, hi), first=lo == 0, last=hi == spec.layers, dtype=F64, device="cpu", seed=3,
            gradient_checkpointing=True,
        )
        for lo, hi in pairwise(edges)
    ]  # fmt: skip
    whole = opened(whole_stage(spec, dtype=F64))
    strengths = dict(whole.named_parameters())
    for part in parts:
        for name, param in part.named_parameters():
            if gate.is_gate(name):
                param.data.copy_(strengths[name])
    hidden = None
    for part in parts:
        hidden = part(hidden, inputs)
    loss = whole(None, inputs)
    assert hidden is not None and torch.equal(hidden, loss)
    hidden.backward()
    loss.backward()
    chained = {name: grad for part in parts for name, grad in gradients(part).items()}
    assert all(torch.equal(chained[name], grad) for name, grad in gradients(whole).items())


def test_weights_from_before_the_gates_fill_everything_else(tmp_path: Path) -> None:
    plain = whole_stage(tiny_spec())
    weights = {name: param.detach().clone() for name, param in plain.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    spec = gated()
    for source in (WeightSource.open_export(spec, tmp_path), WeightSource.open_export(tiny_spec(), tmp_path)):
        stage = whole_stage(spec, source=source)
        drawn = dict(whole_stage(spec).named_parameters())
        for name, param in stage.named_parameters():
            assert torch.equal(param, drawn[name] if gate.is_gate(name) else weights[name]), name
    save_file(
        {name: param.detach().clone() for name, param in opened(stage).named_parameters()},
        tmp_path / "model.safetensors",
    )
    again = whole_stage(spec, source=WeightSource.open_export(spec, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stage.parameters(), strict=True))
    with pytest.raises(UserError, match=r"has, but the config does not.*pair_gate"):
        WeightSource.open_export(tiny_spec(), tmp_path)


def test_a_spec_with_gates_survives_its_description_and_old_ones_have_none() -> None:
    spec = gated()
    assert ModelSpec.from_dict(spec.to_dict()).gate == GATE
    old = spec.to_dict()
    del old["gate"]
    assert ModelSpec.from_dict(old).gate.kind == "none"


@pytest.mark.parametrize("family", sorted(FAMILY_KEYS.keys() - set(FAMILIES)))
def test_families_whose_queries_are_not_known_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"model\.gate: gemma4.*kind to none"):
        gated(family).meta_llm()


def test_lora_and_gates_are_not_combined() -> None:
    config = model_config().model_copy(update={"gate": GATE, "lora": LoraConfig(rank=4)})
    with pytest.raises(UserError, match=r"model\.gate and model\.lora cannot be combined"):
        ModelSpec.resolve(config, vocab_size=96, image_tokens=5)


def test_wrong_heads_are_refused_when_the_model_is_resolved() -> None:
    with pytest.raises(UserError, match=r"model\.gate\.heads=7"):
        gated(config=GateConfig(kind="rave_style", heads="7")).meta_llm()
