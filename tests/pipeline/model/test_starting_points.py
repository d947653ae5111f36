"""Existing vision-language models as starting points: their logits, weights and configs in this project's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.vlms import VLMS
from pipeline.attention import build_plan
from pipeline.config.schema import ModelConfig
from pipeline.masks import Sidecars, parse_layout, position_ids
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource
from tests.pipeline.model.vlms import SIDE, TINY

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


def test_every_tensor_of_the_folder_is_read(stage: Stage, stock: Any) -> None:
    assert stage.spec.start is not None
    source = WeightSource.open(stage.spec)
    assert source is not None and not source.unused
    assert sum(p.numel() for p in stage.parameters()) == sum(p.numel() for p in stock.parameters())
    assert stage.spec.start.family.image_tokens(stage.spec.start.config) == stage.spec.image_tokens == 4
