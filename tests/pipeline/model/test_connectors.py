"""Connectors: sizes as published, what a token depends on, gradients, and the whole stage behind each."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.models.deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
from transformers.models.molmo2.image_processing_molmo2 import arange_for_pooling
from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter

from pipeline.config.schema import ConfigError, ConnectorConfig, ModelConfig
from pipeline.masks import get_policy
from pipeline.model.build import build_stage
from pipeline.model.connectors import CONNECTORS, Connector, Features, Grid, read_connector
from pipeline.model.connectors.attention_pool import AttentionPool
from pipeline.model.connectors.base import resized
from pipeline.model.connectors.cabstractor import SqueezeExcite
from pipeline.model.connectors.dabstractor import DeformableAttention, DeformableLayer
from pipeline.model.connectors.pixel_shuffle import PixelShuffleConnector
from pipeline.model.counts import ParamCounts
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import WeightSource, global_shapes
from tests.pipeline.model.connectors import SECOND, TINY
from tests.pipeline.model.helpers import (
    VOCAB,
    model_config,
    plain_llm,
    random_sidecars,
    slow_loss,
    stage_inputs,
    whole_stage,
)
from tests.pipeline.model.test_stage import assert_close_norms, gradients

F64 = torch.float64
SIGLIP = Features(1152, (27, 27))


def tiny(kind: str, **options: Any) -> Connector:
    return read_connector(ConnectorConfig(kind=kind, **{**TINY[kind], **options}))


def built(connector: Connector, features: Features, out_width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return connector.build(features, out_width).to(F64)


def touched(module: nn.Module, features: Features, token: int) -> torch.Tensor:
    """Return bool[rows, columns]: the patches on which an image token depends."""
    inputs = torch.randn(1, features.patches, features.width, dtype=F64, requires_grad=True)
    module(inputs)[0, token].sum().backward()
    assert inputs.grad is not None
    return inputs.grad[0].abs().sum(-1).view(features.grid) > 0


def square(grid: Grid, rows: range, columns: range) -> torch.Tensor:
    wanted = torch.zeros(grid, dtype=torch.bool)
    wanted[rows.start : rows.stop, columns.start : columns.stop] = True
    return wanted


def test_the_tables_here_name_every_kind() -> None:
    assert TINY.keys() == CONNECTORS.keys() == PUBLISHED.keys()


LATENT = 2 * 1152 + 2 * 1152 + 1152 * 512 + 1152 * 1024 + 512 * 1152 + 2 * 1152 + 2 * 1152 * 4608
SVA_LAYER = (1 + 2) * 1024**2 + 4 * 1024**2 + 3 * 2048 + 2048 + 2 * 1024**2  # context, join; attention; norm; MLP
DEFORMABLE = 4 * 1024 * 1025 + 2 * 1024 * 1025 + 1025 * 64 + 1025 * 32 + 2 * 1024 * 1025 + 3 * 2048
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, Grid | None]] = {
    "perceiver": ({}, 144 * 1152 + 6 * LATENT + 2 * 1152 + 1153 * 3072, 144, None),
    "mlp": ({}, 1153 * 3072 + 3073 * 3072, 729, (27, 27)),
    "cabstractor": ({}, 30_635_680, 144, (12, 12)),
    "dabstractor": ({}, 1153 * 1024 + 729 * 1024 + 144 * 1026 + 6 * DEFORMABLE + 1025 * 3072, 144, None),
    "pixel_shuffle": ({"resize": True}, 2 * 4608 + 4609 * 3072 + 3073 * 3072, 196, (14, 14)),
    "attention_pool": ({}, 4 * 1152 * 1153 + 2 * 1152 * 18944 + 18944 * 3072, 196, (14, 14)),
    "average_pool": ({"window": 3}, 1152 + 1152 * 3072, 81, (9, 9)),
    "sva": (
        {"newline": False},
        1153 * 1024 + 1025 * 1024 + 2048 + 1024 + 3 * SVA_LAYER + 1025 * 3072 + 3073 * 3072,
        576,
        (24, 24),
    ),
}
"""Kind -> options, parameters, tokens and grid behind SigLIP so400m at 384 px, for a decoder of width 3072."""


@pytest.mark.parametrize("kind", CONNECTORS)
def test_sizes_are_the_published_ones(kind: str) -> None:
    options, parameters, tokens, grid = PUBLISHED[kind]
    connector = read_connector(ConnectorConfig(kind=kind, **options))
    with torch.device("meta"):
        module = connector.build(SIGLIP, 3072)
        made = module(torch.empty(2, SIGLIP.patches, SIGLIP.width))
    assert sum(param.numel() for param in module.parameters()) == parameters
    assert made.shape == (2, tokens, 3072)
    assert (connector.tokens(SIGLIP.grid), connector.grid(SIGLIP.grid)) == (tokens, grid)


def test_flops_are_those_of_the_matrix_products() -> None:
    mlp = read_connector(ConnectorConfig(kind="mlp"))
    assert mlp.flops(SIGLIP, 3072) == 2 * 729 * (1152 * 3072 + 3072 * 3072)
    shuffle = read_connector(ConnectorConfig(kind="pixel_shuffle", resize=True))
    assert shuffle.flops(SIGLIP, 3072) == 2 * 196 * (4608 * 3072 + 3072 * 3072)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", CONNECTORS)
def test_gradients_are_those_of_finite_differences(kind: str, norm: bool) -> None:
    features = Features(6, (4, 4))
    connector = tiny(kind, norm=norm)
    module = built(connector, features, 4)
    with torch.no_grad():  # deformable attention starts on patch centres, where interpolation has a kink
        for param in module.parameters():
            param += 0.05 * torch.randn_like(param)
    inputs = torch.randn(1, features.patches, features.width, dtype=F64, requires_grad=True)
    names = [name for name, param in module.named_parameters() if param.numel() <= 32]
    params = [module.get_parameter(name) for name in names]
    assert module(inputs).shape == (1, connector.tokens(features.grid), 4)
    assert torch.autograd.gradcheck(lambda *_: module(inputs), (inputs, *params), fast_mode=True)
    module(inputs).square().sum().backward()
    assert all(param.grad is not None for param in module.parameters())


@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle", "attention_pool", "sva"])
def test_a_token_depends_on_its_own_window(kind: str) -> None:
    features = Features(8, (4, 4))
    connector = tiny(kind, **({"newline": False} if kind == "sva" else {}))
    module = built(connector, features)
    if kind == "sva":
        for layer in module.layers:  # the mean of all patches reaches every query, by design
            nn.init.zeros_(layer.context.weight)
    grid = connector.grid(features.grid)
    assert grid is not None
    side = features.grid[0] // grid[0]
    for token in range(grid[0] * grid[1]):
        row, column = divmod(token, grid[1])
        wanted = square(features.grid, range(side * row, side * (row + 1)), range(side * column, side * (column + 1)))
        assert torch.equal(touched(module, features, token), wanted)


def test_sva_sees_the_whole_image_through_its_context_only() -> None:
    features = Features(8, (4, 4))
    assert touched(built(tiny("sva"), features), features, 0).all()


def test_cabstractor_sees_its_neighbourhood_and_the_rest_through_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(5, (10, 10))
    module = built(tiny("cabstractor", queries=25), features)
    assert touched(module, features, 0).all(), "the mean of squeeze-and-excitation"
    monkeypatch.setattr(SqueezeExcite, "forward", lambda self, map_: map_)
    for token, rows, columns in (
        (0, range(5), range(5)),
        (12, range(1, 9), range(1, 9)),
        (24, range(5, 10), range(5, 10)),
    ):
        assert torch.equal(touched(module, features, token), square(features.grid, rows, columns)), token


def test_perceiver_does_not_know_where_a_patch_is() -> None:
    features = Features(6, (3, 3))
    module, inputs = built(tiny("perceiver"), features), torch.randn(2, 9, 6, dtype=F64)
    assert torch.allclose(module(inputs), module(inputs[:, torch.randperm(9)]), atol=1e-12)


def test_pixel_shuffle_equals_the_librarys() -> None:
    features, inputs = Features(3, (4, 6)), torch.randn(2, 24, 3)
    module = PixelShuffleConnector(3, 5, grid=features.grid, fitted=features.grid, factor=2)
    theirs = InternVLModel.pixel_shuffle(None, inputs.view(2, 4, 6, 3), scale_factor=0.5)
    assert torch.equal(module.shuffle(inputs), theirs.flatten(1, 2))


def test_grids_are_resized_as_interpolation_does() -> None:
    inputs = torch.randn(2, 9, 4)
    wanted = F.interpolate(inputs.transpose(1, 2).view(2, 4, 3, 3), (4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(resized(inputs, (3, 3), (4, 4)), wanted.flatten(2).transpose(1, 2))
    assert resized(inputs, (3, 3), (3, 3)) is inputs
    assert resized(inputs.bfloat16(), (3, 3), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("window", [2, 3])
def test_attention_pool_equals_the_librarys(window: int) -> None:
    """On 5 x 4 patches, so that windows at the edges are not full."""
    config = Molmo2AdapterConfig(
        vision_feature_layer=[-1], hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
        intermediate_size=12, text_hidden_size=6,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = Molmo2Adapter(config).double()
    mine = AttentionPool(8, 6, grid=(5, 4), window=window, heads=2, head_dim=4, hidden=12).double()
    pool, project = theirs.image_pooling_2d, theirs.image_projector
    pairs = [
        (mine.to_q, pool.q_proj), (mine.to_k, pool.k_proj), (mine.to_v, pool.v_proj), (mine.to_out, pool.o_proj),
        (mine.gate, project.gate_proj), (mine.up, project.up_proj), (mine.down, project.down_proj),
    ]  # fmt: skip
    for own, other in pairs:
        other.load_state_dict(own.state_dict())
    inputs = torch.randn(1, 20, 8, dtype=F64)
    indices, rows, columns = arange_for_pooling(torch.arange(20).view(5, 4), window, window)
    wanted = theirs(inputs, indices).last_hidden_state
    assert torch.allclose(mine(inputs)[0], wanted, atol=1e-12) and len(wanted) == rows * columns


def test_a_deformable_layer_equals_the_librarys() -> None:
    config = DeformableDetrConfig(
        d_model=8, decoder_attention_heads=2, decoder_n_points=3, decoder_ffn_dim=12, num_feature_levels=1, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, disable_custom_kernels=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = DeformableDetrDecoderLayer(config).double()
    mine = DeformableLayer(8, heads=2, points=3, ff=12, grid=(3, 5)).double()
    for param in mine.parameters():
        nn.init.normal_(param)
    renamed = {name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2"): v for name, v in mine.state_dict().items()}
    theirs.load_state_dict(renamed)
    hidden, positions, image = (torch.randn(2, count, 8, dtype=F64) for count in (4, 4, 15))
    points = torch.rand(4, 2, dtype=F64)
    wanted = theirs(
        hidden, positions, reference_points=points[None, :, None].expand(2, -1, -1, -1),
        spatial_shapes=torch.tensor([[3, 5]]), spatial_shapes_list=[(3, 5)], level_start_index=torch.tensor([0]),
        encoder_hidden_states=image,
    )  # fmt: skip
    assert torch.allclose(mine(hidden, positions, image, points), wanted, atol=1e-12)


def test_a_query_without_offsets_samples_its_reference_point() -> None:
    attention = DeformableAttention(4, heads=2, points=3, grid=(3, 3)).double()
    nn.init.zeros_(attention.sampling_offsets.bias)
    for linear in (attention.value_proj, attention.output_proj):
        nn.init.eye_(linear.weight)
    image = torch.randn(1, 9, 4, dtype=F64)
    points = torch.tensor([[0.5, 0.5], [1 / 3, 1 / 6]], dtype=F64, requires_grad=True)  # a centre; between two patches
    got = attention(torch.randn(1, 2, 4, dtype=F64), image, points)
    assert torch.allclose(got[0, 0], image[0, 4]) and torch.allclose(got[0, 1], (image[0, 0] + image[0, 1]) / 2)
    got.square().sum().backward()
    assert points.grad is not None and points.grad.any()


def test_the_heads_of_deformable_attention_start_in_different_directions() -> None:
    bias = DeformableAttention(8, heads=4, points=2, grid=(3, 3)).sampling_offsets.bias.view(4, 2, 2)
    assert torch.allclose(bias[:, 0], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6)
    assert torch.equal(bias[:, 1], 2 * bias[:, 0])


def test_cambrians_newline_follows_every_row() -> None:
    features = Features(8, (4, 4))
    plain, lined = (built(tiny("sva", newline=newline), features) for newline in (False, True))
    lined.load_state_dict(plain.state_dict() | {"newline": lined.newline})
    inputs = torch.randn(1, 16, 8, dtype=F64)
    wanted = torch.cat([plain(inputs).view(1, 2, 2, -1), lined.newline.expand(1, 2, 1, -1)], 2)
    assert torch.equal(lined(inputs), wanted.flatten(1, 2))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cabstractor", {"queries": 140}, "queries=140 is not a square number: set it to 121 or 144"),
        ("dabstractor", {"queries": 2}, "queries=2 is not a square"),
        ("dabstractor", {"heads": 7}, "heads=7 does not divide hidden=1024"),
        ("pixel_shuffle", {}, "factor=2 does not divide the tower's 27 x 27 patches: set model.connector.resize"),
        ("attention_pool", {"heads": 7}, "heads=7 does not divide the tower's width 1152"),
        ("sva", {"decoder_layers": 3}, "decoder_layers=3 is not supported: .*only the first pipeline stage holds"),
        ("sva", {"heads": 3}, "heads=3 does not divide hidden=1024"),
    ],
)
def test_what_cannot_be_built_is_refused(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_connector(ConnectorConfig(kind=kind, **options)).build(SIGLIP, 64)


# ---- behind a tower, in front of a decoder


def stage_config(kind: str, **options: Any) -> ModelConfig:
    raw = model_config().model_dump()
    raw["vision"]["config"]["image_size"] = 32  # 4 x 4 patches
    return ModelConfig.model_validate({**raw, "connector": {"kind": kind, **TINY[kind], **options}})


def stage_spec(kind: str, **options: Any) -> ModelSpec:
    return ModelSpec.resolve(stage_config(kind, **options), vocab_size=VOCAB, image_tokens=None)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_packed_rows_equal_single_samples_and_two_stages_one(kind: str) -> None:
    spec = stage_spec(kind)
    stage = whole_stage(spec, dtype=F64)
    sidecars = random_sidecars(1, 3, padding=7, image_tokens=spec.image_tokens)
    inputs = stage_inputs(sidecars, dtype=F64, side=32)
    assert inputs.pixels is not None and len(inputs.pixels) >= 2
    like = torch.empty(0, dtype=F64)
    one_by_one = torch.cat([stage.image_tokens(pixels[None], like) for pixels in inputs.pixels])
    assert torch.allclose(stage.image_tokens(inputs.pixels, like), one_by_one, rtol=0, atol=1e-12)

    loss = stage(None, inputs)
    loss.backward()
    mine = gradients(stage)
    stage.zero_grad()
    slow = slow_loss(stage, model := plain_llm(stage), inputs)
    slow.backward()
    theirs = gradients(model) | {k: v for k, v in gradients(stage).items() if k.startswith("connector.")}
    assert abs(loss - slow) <= 1e-12 * abs(slow)
    assert_close_norms(mine, theirs, 1e-10)

    hidden = None
    for lo, hi in pairwise((0, 1, spec.layers)):
        own = build_stage(
            spec, layers=range(lo, hi), first=lo == 0, last=hi == spec.layers, dtype=F64, device="cpu", seed=3
        )
        hidden = own(hidden, inputs)
    assert hidden is not None and torch.equal(hidden, loss)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_policies_that_need_a_grid_take_the_connectors(kind: str) -> None:
    spec = stage_spec(kind, **({"newline": False} if kind == "sva" else {}))
    kept = {"mlp": (4, 4), "cabstractor": (2, 2), "pixel_shuffle": (2, 2), "attention_pool": (2, 2), "sva": (2, 2)}
    kept["average_pool"] = (2, 2)
    assert spec.mask_grid == kept.get(kind)
    if spec.mask_grid:
        assert spec.mask_grid[0] * spec.mask_grid[1] == spec.image_tokens
        assert get_policy("cca", grid=spec.mask_grid).grid == spec.mask_grid


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_saved_connector_is_read_again(kind: str) -> None:
    spec = stage_spec(kind, norm=True)
    again = ModelSpec.from_dict(spec.to_dict())
    assert again.connector == spec.connector and again.connector.kind == kind
    counts = ParamCounts.of(again)
    assert counts.connector == sum(param.numel() for param in whole_stage(spec).connector.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_norm_starts_at_the_scale_of_the_text(family: str) -> None:
    """Gemma multiplies its embeddings inside the module, which counts: image tokens stand beside its output."""
    raw = model_config(family).model_dump()
    config = ModelConfig.model_validate({**raw, "connector": {**raw["connector"], "norm": True}})
    spec = ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=None)
    stage = whole_stage(spec)
    text = stage.model.embed_tokens(torch.arange(spec.vocab_rows))
    images = stage.image_tokens(torch.randn(2, 3, 16, 16), text)
    scale = text.detach().square().mean().sqrt()
    assert torch.allclose(stage.connector.norm.weight, scale.expand(spec.width))
    assert float(images.detach().square().mean().sqrt()) == pytest.approx(float(scale), rel=1e-3)


def test_without_the_norm_a_connector_is_what_it_was() -> None:
    make: Callable[..., nn.Module] = lambda **options: built(tiny("mlp", **options), Features(3, (2, 2)))  # noqa: E731
    plain, normed = make(), make(norm=True)
    assert {f"connector.{name}" for name, _ in plain.named_parameters()} < {n for n, _ in normed.named_parameters()}
    inputs = torch.randn(1, 4, 3, dtype=F64)
    assert torch.allclose(normed(inputs), F.layer_norm(plain(inputs), (6,)))


@pytest.mark.parametrize("vision", ["siglip_vision_model", "clip_vision_model"])
def test_attention_pool_reads_the_outputs_of_two_blocks(vision: str) -> None:
    raw = model_config(vision=vision).model_dump()
    raw["connector"] = {"kind": "attention_pool", **TINY["attention_pool"], "layers": [1, 0]}
    spec = ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=None)
    stage = whole_stage(spec)
    assert (spec.features.width, stage.connector.to_q.weight.shape) == (48, (24, 48)), "Molmo: twice the width, inwards"
    seen: list[torch.Tensor] = []
    stage.connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randn(2, 3, 16, 16)
    stage.image_tokens(pixels, torch.empty(0))
    assert not any(block._forward_hooks for block in spec.vision_family.blocks(stage.vision))
    states = stage.vision(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(seen[0], torch.cat([states[2], states[1]], -1)[:, -4:])


def with_layers(*layers: int) -> ModelSpec:
    raw = model_config().model_dump()
    raw["vision"]["frozen"] = False
    raw["connector"] = {"kind": "attention_pool", **TINY["attention_pool"], "layers": layers}
    return ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=None)


def test_blocks_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="the tower has 2 blocks, but no block 2"):
        with_layers(2)


def test_blocks_after_the_last_that_is_read_stay_as_they_are() -> None:
    stage = whole_stage(with_layers(0))
    trained = {name for name, param in stage.vision.named_parameters() if param.requires_grad}
    frozen = {name for name, _ in stage.vision.named_parameters()} - trained
    assert {name.split(".")[0] for name in frozen} == {"encoder", "post_layernorm"}
    assert {name for name in frozen if name.startswith("encoder.layers.1.")} == {
        name for name, _ in stage.vision.named_parameters() if name.startswith("encoder.layers.1.")
    }
    assert any(name.startswith("encoder.layers.0.") for name in trained)


# ---- several towers


def two_towers(**vision: Any) -> ModelConfig:
    raw = stage_config("sva", newline=False).model_dump()
    raw["vision"].update(vision)
    return ModelConfig.model_validate({**raw, "extra_vision": [{"config": SECOND}]})


def test_a_query_sees_its_window_of_every_tower() -> None:
    """4 x 4 patches of the first tower and 6 x 6 of the second, in windows of 2 x 2 and 3 x 3."""
    features = Features(6, (4, 4), others=(Features(8, (6, 6)),))
    module = built(tiny("sva", newline=False), features)
    for layer in module.layers:
        nn.init.zeros_(layer.context.weight)
    towers = (features, *features.others)
    inputs = [torch.randn(1, own.patches, own.width, dtype=F64, requires_grad=True) for own in towers]
    module(*inputs)[0, 1].sum().backward()
    for given, grid, side in zip(inputs, ((4, 4), (6, 6)), (2, 3), strict=True):
        assert given.grad is not None
        seen = given.grad[0].abs().sum(-1).view(grid) > 0
        assert torch.equal(seen, square(grid, range(side), range(side, 2 * side)))


def test_two_towers_see_the_same_images_and_keep_their_own_weights() -> None:
    spec = ModelSpec.resolve(two_towers(), vocab_size=VOCAB, image_tokens=None)
    stage = whole_stage(spec)
    frozen = {name for name, param in stage.named_parameters() if not param.requires_grad}
    assert frozen == {name for name, _ in stage.named_parameters() if name.startswith(("vision.", "extra_vision."))}
    assert not stage.extra_vision[0].training
    names = dict(global_shapes(spec))
    assert names == {name: tuple(param.shape) for name, param in stage.named_parameters()}
    images = [Image.effect_noise((60, 50), 80).convert("RGB"), Image.effect_noise((30, 70), 80).convert("RGB")]
    pixels, *extra = (tower.preprocess.batch(images) for tower in spec.towers.values())
    assert (pixels.shape[-1], extra[0].shape[-1]) == (32, 48)
    like = torch.empty(0)
    tokens = stage.image_tokens(pixels, like, extra)
    assert tokens.shape == (2 * spec.image_tokens, spec.width)
    single = torch.cat([stage.image_tokens(pixels[i : i + 1], like, [extra[0][i : i + 1]]) for i in range(2)])
    assert torch.allclose(tokens, single, atol=1e-6)
    assert not torch.allclose(tokens, stage.image_tokens(pixels, like, [-extra[0]]), atol=1e-3)
    assert stage.image_tokens(None, like).shape == (spec.image_tokens, spec.width), "blank images for every tower"
    counts = ParamCounts.of(spec)
    assert counts.total == sum(param.numel() for param in stage.parameters())
    work = [sum(map(torch.numel, tower.parameters())) for tower in (stage.vision, stage.extra_vision[0])]
    assert counts.vision * counts.patches == pytest.approx(work[0] * 16 + work[1] * 36)


def test_a_saved_model_keeps_its_towers(tmp_path: Path) -> None:
    spec = ModelSpec.resolve(two_towers(), vocab_size=VOCAB, image_tokens=None)
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.to_dict() == spec.to_dict() and again.features == spec.features
    stage = whole_stage(spec)
    save_file({name: param.contiguous() for name, param in stage.named_parameters()}, tmp_path / "model.safetensors")
    loaded = whole_stage(again, source=WeightSource.open_export(again, tmp_path))
    assert all(torch.equal(param, loaded.get_parameter(name)) for name, param in stage.named_parameters())


def test_a_second_tower_is_read_from_its_folder(tmp_path: Path) -> None:
    tower = whole_stage(ModelSpec.resolve(two_towers(), vocab_size=VOCAB, image_tokens=None)).extra_vision[0]
    tower.save_pretrained(tmp_path)
    raw = two_towers().model_dump()
    raw["extra_vision"] = f"[{{source: '{tmp_path}'}}]"  # as on the command line
    spec = ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=None)
    stage = build_stage(
        spec, layers=range(3), first=True, last=True, dtype=torch.float32, device="cpu", seed=9,
        source=WeightSource.open(spec),
    )  # fmt: skip
    for name, param in tower.named_parameters():
        assert torch.equal(param, stage.extra_vision[0].get_parameter(name)), name


def test_a_connector_of_one_tower_refuses_a_second() -> None:
    raw = two_towers().model_dump() | {"connector": {"kind": "mlp"}}
    with pytest.raises(ConfigError, match=r"model\.extra_vision needs a connector.*kind is mlp: remove it, or use sva"):
        ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=None)
    wrong = two_towers().model_dump() | {"extra_vision": [{"config": {"model_type": "vit"}}]}
    with pytest.raises(ConfigError, match=r"model\.extra_vision\.0: model_type 'vit'"):
        ModelSpec.resolve(ModelConfig.model_validate(wrong), vocab_size=VOCAB, image_tokens=None)
