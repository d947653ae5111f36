"""Images of their own sizes: packed patches equal the stock tower's padded ones, and headers give the tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from data_prep.media.spec import MediaSpec, NativeImages
from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.model.families.siglip2 import SIGLIP2
from pipeline.model.patches import PatchLayout
from pipeline.model.spec import ModelSpec
from tests.pipeline.model.helpers import NAFLEX, VOCAB, model_config, whole_stage

GRIDS = [(3, 3), (1, 7), (5, 2), (2, 2)]


@pytest.fixture(scope="module")
def tower() -> Siglip2VisionModel:
    config = {name: value for name, value in NAFLEX.items() if name != "model_type"}
    torch.manual_seed(0)
    model = SIGLIP2.build(Siglip2VisionConfig(**SIGLIP2.prepared(config)))
    return model.double().eval()


def patches(seed: int = 0) -> torch.Tensor:
    count = sum(rows * columns for rows, columns in GRIDS)
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_packed_patches_equal_the_stock_tower_on_padded_images(tower: Siglip2VisionModel) -> None:
    drawn, layout = patches(), PatchLayout.of(GRIDS, 1)
    packed = SIGLIP2.packed(tower, drawn, layout).split(layout.lengths)
    most = max(layout.lengths)
    for grid, own, ours in zip(GRIDS, drawn.split(layout.lengths), packed, strict=True):
        flat = own.permute(0, 2, 3, 1).flatten(1)
        padded = torch.cat([flat, flat.new_zeros(most - len(flat), flat.shape[1])])[None]
        mask = (torch.arange(most) < len(flat)).long()[None]
        stock = tower(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor([grid]))
        torch.testing.assert_close(ours, stock.last_hidden_state[0, : len(flat)], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_patch_sees_its_own_image_only(tower: Siglip2VisionModel) -> None:
    layout, before = PatchLayout.of(GRIDS, 1), patches()
    after = before.clone()
    after[12] += 1.0  # in the second image
    moved = (SIGLIP2.packed(tower, before, layout) != SIGLIP2.packed(tower, after, layout)).any(1)
    assert moved.nonzero().flatten().tolist() == list(range(9, 16))


def test_the_patches_of_a_token_lie_side_by_side() -> None:
    layout = PatchLayout.of([(2, 4), (4, 2)], 2)
    assert layout.order.view(-1, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@torch.no_grad()
def test_squares_are_read_as_images_of_one_size(tower: Siglip2VisionModel) -> None:
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    ours = SIGLIP2.features(tower, tower.config, pixels)
    cut = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    packed = SIGLIP2.packed(tower, cut, PatchLayout.of([(3, 3)] * 2, 1))
    torch.testing.assert_close(ours.flatten(0, 1), packed, rtol=0, atol=1e-12)


def raw_config(**connector: Any) -> ModelConfig:
    raw = model_config().model_dump()
    raw["vision"]["config"], raw["connector"] = NAFLEX, connector
    return ModelConfig.model_validate(raw)


def resolved(config: ModelConfig, **image: Any) -> ModelSpec:
    media = MediaSpec(image=NativeImages(**{"kind": "native", "patch_px": 8, **image}))
    return ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=1, media=media)


CONNECTORS: list[tuple[dict[str, Any], int]] = [
    ({"kind": "mlp"}, 1),
    ({"kind": "pixel_shuffle", "factor": 2, "norm": True}, 2),
    ({"kind": "attention_pool", "window": 3, "heads": 2, "hidden": 8}, 3),
]


@torch.no_grad()
@pytest.mark.parametrize(("connector", "merge"), CONNECTORS, ids=[one["kind"] for one, _ in CONNECTORS])
def test_headers_give_as_many_tokens_as_the_model_makes(connector: dict[str, Any], merge: int) -> None:
    rng = random.Random(3)
    sizes = [(1, 1), (8000, 300), (300, 8000), (8000, 1)] + [
        (rng.randint(1, 900), rng.randint(1, 900)) for _ in "a" * 40
    ]
    for resize in ("budget", "size"):
        spec = resolved(raw_config(**connector), merge=merge, max_tokens=12, resize=resize)
        stage, extents = whole_stage(spec), spec.extents(sizes)
        layout = PatchLayout.of([extent.view for extent in extents], merge)
        made = stage.image_tokens(torch.zeros(len(layout.order), 3, 8, 8), torch.zeros(1), layout=layout)
        assert len(made) == sum(extent.tokens for extent in extents)
        assert stage.image_tokens(None, torch.zeros(1)).shape == (1, spec.width), "a blank image"


@pytest.mark.parametrize(
    ("config", "image", "words"),
    [
        (model_config(), {}, "a tower of type siglip_vision_model does not read"),
        (raw_config(kind="mlp"), {"patch_px": 16}, "media.image.patch_px 8"),
        (raw_config(kind="mlp"), {"merge": 2}, "does not make one token of 2 x 2"),
        (raw_config(kind="perceiver", latents=1), {}, "does not make one token of 1 x 1"),
        (raw_config(kind="attention_pool", window=1, heads=2, hidden=8, layers=[0]), {}, "remove model.extra_vision"),
    ],
)
def test_towers_and_connectors_that_cannot_are_refused(config: ModelConfig, image: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolved(config, **image)
