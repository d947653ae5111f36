"""A stage on packed rows against the library's own model, sample by sample under dense masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.attention import build_plan
from pipeline.masks import POLICIES, Sidecars
from pipeline.model import stage as stage_module
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from tests.pipeline.model.helpers import (
    FAMILY_KEYS,
    IMAGE_TOKENS,
    VISION_KEYS,
    VOCAB,
    model_config,
    plain_llm,
    random_sidecars,
    slow_loss,
    stage_inputs,
    tiny_spec,
    whole_stage,
)

F32, F64 = torch.float32, torch.float64


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in module.named_parameters() if param.grad is not None}


def assert_close_norms(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        off = (value - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30)
        assert off <= tolerance, f"{name}: {off:.1e}"


@pytest.mark.parametrize("family", FAMILY_KEYS)
def test_loss_and_every_gradient_equal_the_plain_model_sample_by_sample(family: str) -> None:
    stage = whole_stage(tiny_spec(family), dtype=F64)
    sidecars = Sidecars.concat(
        [
            random_sidecars(1, 3, padding=7),
            random_sidecars(2, 2, padding=0, text_only=True),
            random_sidecars(3, 3, padding=4),
        ]
    )
    inputs = stage_inputs(sidecars, dtype=F64)
    assert inputs.pixels is not None and len(inputs.pixels) >= 4

    loss = stage(None, inputs)
    loss.backward()
    mine = gradients(stage)
    stage.zero_grad()
    model = plain_llm(stage)
    slow = slow_loss(stage, model, inputs)
    slow.backward()
    theirs = gradients(model) | {k: v for k, v in gradients(stage).items() if k.startswith("connector.")}

    # Gemma's library code computes its norms and soft caps in single precision whatever the model's type.
    tolerance = 1e-6 if family.startswith("gemma") else 1e-12
    assert abs(loss - slow) <= tolerance * abs(slow)
    assert_close_norms(mine, theirs, tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_single_precision_agrees_to_its_rounding(family: str) -> None:
    stage = whole_stage(tiny_spec(family))
    inputs = stage_inputs(random_sidecars(5, 4, padding=3), dtype=F32)
    loss = stage(None, inputs)
    loss.backward()
    mine = gradients(stage)
    stage.zero_grad()
    model = plain_llm(stage)
    slow = slow_loss(stage, model, inputs)
    slow.backward()
    assert abs(loss - slow) <= 1e-6 * abs(slow)
    theirs = gradients(model)
    shared = {name: grad for name, grad in mine.items() if name in theirs}
    off = torch.cat([(grad - theirs[name]).flatten() for name, grad in shared.items()]).norm()
    assert off <= 1e-6 * torch.cat([grad.flatten() for grad in theirs.values()]).norm()
    assert_close_norms(shared, theirs, 2e-6)  # the small gradients of norms carry the rounding of both sides


@pytest.mark.parametrize(
    "policy", [name for name, policy in POLICIES.items() if not policy.leaks and not policy.needs_grid]
)
def test_every_policy_reaches_the_layers(policy: str) -> None:
    stage = whole_stage(tiny_spec(), dtype=F64)
    inputs = stage_inputs(random_sidecars(8, 3, padding=2), policy=policy, dtype=F64)
    assert torch.allclose(stage(None, inputs), slow_loss(stage, plain_llm(stage), inputs, policy=policy), rtol=1e-9)


def test_each_layer_attends_under_its_own_policy() -> None:
    stage, sidecars = whole_stage(tiny_spec(), dtype=F64), random_sidecars(8, 3, padding=2)
    inputs = stage_inputs(sidecars, policy="mma+0:1=mixed+2:3=causal", dtype=F64)
    hidden = stage.embed(inputs)
    found = stage.decode(hidden, inputs)
    for layer, policy in enumerate(("mixed", "mma", "causal")):
        hidden = stage.decode(hidden, replace(inputs, plan=build_plan(policy, sidecars)), range(layer, layer + 1))
    assert torch.equal(found, hidden)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "olmo3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_chained_stages_equal_one(family: str, tied: bool, cuts: tuple[int, ...]) -> None:
    spec = tiny_spec(family, tie_word_embeddings=tied)
    whole = whole_stage(spec, dtype=F64)
    inputs = stage_inputs(random_sidecars(4, 3, padding=5), dtype=F64)
    edges = [0, *cuts, spec.layers]
    parts = [
        build_stage(spec, layers=range(lo, hi), first=lo == 0, last=hi == spec.layers, dtype=F64, device="cpu", seed=3)
        for lo, hi in pairwise(edges)
    ]
    hidden = None
    for part in parts:
        hidden = part(hidden, inputs)
    assert hidden is not None
    loss = whole(None, inputs)
    assert torch.equal(hidden, loss)
    hidden.backward()
    loss.backward()
    chained: dict[str, torch.Tensor] = {}
    for part in parts:
        chained |= gradients(part)
    if tied:
        chained["model.embed_tokens.weight"] += chained.pop("lm_head.weight")
    assert_close_norms(chained, gradients(whole), 1e-12)


def test_without_images_nothing_changes_and_every_parameter_is_reached() -> None:
    stage = whole_stage(tiny_spec())
    inputs = stage_inputs(random_sidecars(6, 3, padding=3, text_only=True), dtype=F32)
    loss = stage(None, inputs)
    loss.backward()
    model = plain_llm(stage)
    assert torch.allclose(loss, slow_loss(stage, model, inputs), rtol=1e-6)
    connector = [param.grad for param in stage.connector.parameters()]
    assert all(grad is not None and not grad.any() for grad in connector)


def test_a_row_without_targets_has_exactly_no_loss_and_reaches_the_head() -> None:
    stage = whole_stage(tiny_spec())
    inputs = stage_inputs(random_sidecars(7, 2, padding=0), dtype=F32)
    loss = stage(None, replace(inputs, labels=torch.full_like(inputs.labels, IGNORE)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(param.grad is not None and not param.grad.any() for param in stage.parameters() if param.requires_grad)


@pytest.mark.parametrize("vision", VISION_KEYS)
def test_checkpointing_changes_nothing(vision: str) -> None:
    spec = tiny_spec(vision=vision)
    inputs = stage_inputs(random_sidecars(9, 3, padding=1), dtype=F32)
    results = []
    for every in (0, 1, 2):
        stage = whole_stage(spec, gradient_checkpointing=every)
        stage(None, inputs).backward()
        results.append(gradients(stage))
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_every_other_layer_of_the_model_is_recomputed_whatever_stage_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed: list[nn.Module] = []

    def noted(layer: nn.Module, *args: Any, **options: Any) -> Any:
        recomputed.append(layer)
        return checkpoint(layer, *args, **options)

    monkeypatch.setattr(stage_module, "checkpoint", noted)
    stage = whole_stage(tiny_spec(), gradient_checkpointing=2)
    stage(None, stage_inputs(random_sidecars(1, 2, padding=0), dtype=F32))
    assert recomputed == [layer for index, layer in stage.model.layers.items() if int(index) % 2 == 0]
    assert 0 < len(recomputed) < len(stage.model.layers)


def test_a_frozen_tower_stays_in_evaluation_and_gets_no_gradient() -> None:
    stage = whole_stage(tiny_spec())
    stage.train()
    stage(None, stage_inputs(random_sidecars(1, 2, padding=0), dtype=F32)).backward()
    assert stage.training and not stage.vision.training
    assert all(param.grad is None and not param.requires_grad for param in stage.vision.parameters())


def test_a_trained_tower_gets_gradients_everywhere() -> None:
    stage = whole_stage(replace(tiny_spec(vision="clip_vision_model"), vision_frozen=False))
    stage(None, stage_inputs(random_sidecars(1, 3, padding=0), dtype=F32)).backward()
    assert all(param.grad is not None for param in stage.parameters())


def test_image_tokens_land_at_their_positions() -> None:
    stage = whole_stage(tiny_spec())
    inputs = stage_inputs(random_sidecars(1, 3, padding=0), dtype=F32)
    assert inputs.pixels is not None
    embeds = stage.embed(inputs)[0]
    images = stage.image_tokens(inputs.pixels, embeds).unflatten(0, (-1, IMAGE_TOKENS))
    for index in range(len(inputs.pixels)):
        assert torch.equal(embeds[inputs.plan.sidecars.instance == index], images[index])


def test_casting_the_stage_keeps_rotary_frequencies_exact() -> None:
    stage: Stage = whole_stage(tiny_spec())
    before = stage.rotary.inv_freq.clone()
    stage.bfloat16()
    assert stage.rotary.inv_freq.dtype == F32 and torch.equal(stage.rotary.inv_freq, before)


@pytest.mark.parametrize("family", FAMILY_KEYS)
@pytest.mark.parametrize("vision", VISION_KEYS)
def test_no_step_is_random_whatever_the_config(family: str, vision: str) -> None:
    """A checkpoint therefore needs no random-number state, and a resumed run equals an uninterrupted one."""
    plain = tiny_spec(family, vision=vision)
    rates = {key: 0.5 for key in plain.llm.to_dict() if "drop" in key}
    config = model_config(family, vision=vision, **rates)
    towers = {key: 0.5 for key in plain.vision.to_dict() if "drop" in key}
    assert rates and towers, "the library calls its dropout keys otherwise now"
    config.vision.config.update(towers)
    spec = ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    stage = whole_stage(replace(spec, vision_frozen=False)).train()
    inputs = stage_inputs(random_sidecars(3, 2, padding=2), dtype=torch.float32)
    before, results = torch.get_rng_state(), []
    for _ in range(2):
        stage.zero_grad()
        loss = stage(None, inputs)
        loss.backward()
        results.append((loss.detach(), gradients(stage)))
    assert torch.equal(torch.get_rng_state(), before), "a step drew random numbers"
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
