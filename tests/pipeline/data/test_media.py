"""Images of different sizes, from raw files to the loss: packed equals unpacked, and packs and model agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.common.files import sha256_file, sha256_line
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.media.spec import Header, extents
from data_prep.packs import PackReader, PackRow
from data_prep.text.encoding import Encoded
from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.data.batches import BatchSource
from pipeline.data.order import BatchOrder
from pipeline.masks import get_policy
from pipeline.model.spec import ModelSpec
from pipeline.serving.prompt import Prompt, stage_inputs
from tests.pipeline.data.sizes import alone, make_world
from tests.pipeline.model.helpers import NAFLEX, model_config, whole_stage

ANYRES = {"image": {"kind": "anyres", "tokens": 5, "tile_px": 16, "max_tiles": 4, "thumbnail": "last"}}
NATIVE = {"image": {"kind": "native", "patch_px": 8, "merge": 2, "max_tokens": 6}}
WORLDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anyres": (ANYRES, {"max_image_tokens": 60}),
    "native": (NATIVE, {"max_image_tokens": 13}),
    "native, own size": ({"image": {**NATIVE["image"], "resize": "size"}}, {"max_image_tokens": 13}),
}


@pytest.fixture(scope="module", params=WORLDS)
def packs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackReader:
    media, pack = WORLDS[request.param]
    return make_world(tmp_path_factory.mktemp(request.param), media, **pack)


def config_for(packs: PackReader) -> ModelConfig:
    raw = model_config().model_dump()
    if packs.manifest.media_spec.image.kind == "native":
        raw["vision"]["config"] = NAFLEX
        raw["connector"] = {"kind": "pixel_shuffle", "factor": 2}
    return ModelConfig.model_validate(raw)


def spec_for(packs: PackReader, config: ModelConfig | None = None) -> ModelSpec:
    manifest = packs.manifest
    return ModelSpec.resolve(
        config or config_for(packs), vocab_size=manifest.vocab_size, image_tokens=manifest.image_tokens,
        media=manifest.media,
    )  # fmt: skip


def source(packs: PackReader, spec: ModelSpec) -> BatchSource:
    return BatchSource(
        packs, order=BatchOrder(1, 1, 1), dp_rank=0, policy=get_policy("mma"),
        preprocess=[tower.preprocess for tower in spec.towers.values()], threads=0, ahead=1,
    )  # fmt: skip


def test_rows_hold_what_the_headers_say(packs: PackReader) -> None:
    manifest, store = packs.manifest, ImageStore(packs.directory / packs.manifest.image_store)
    sizes, tokens = set(), 0
    for row in packs:
        assert row.media is not None
        table = manifest.media_spec.table([Header(*store.size(index)) for index in row.image_row.tolist()])
        assert np.array_equal(row.media, table)
        counts = np.bincount(row.instance[row.instance >= 0], minlength=len(row.image_row))
        assert counts.tolist() == [extent.tokens for extent in extents(table)]
        assert counts.sum() <= manifest.recipe["max_image_tokens"]
        tokens += int(counts.sum())
        sizes |= set(counts.tolist())
    assert tokens == manifest.all_media_tokens and len(sizes) > 1, "images of several sizes"


@torch.no_grad()
def test_packed_equals_unpacked(packs: PackReader) -> None:
    """The loss of a row that mixes images of different sizes and text is the sum of the losses of its samples."""
    spec = spec_for(packs)
    stage, batches = whole_stage(spec, dtype=torch.float64), source(packs, spec)
    assert any({row.instance.max() for row in alone(full)} >= {-1, 0} for full in packs)
    for full in packs:
        packed = stage(None, batches.inputs([full]))
        apart = sum(float(stage(None, batches.inputs([row]))) for row in alone(full))
        assert float(packed) == pytest.approx(apart, rel=1e-9)


@torch.no_grad()
def test_serving_computes_what_training_computes(packs: PackReader) -> None:
    spec, store = spec_for(packs), ImageStore(packs.directory / packs.manifest.image_store)
    stage, batches = whole_stage(spec, dtype=torch.float64), source(packs, spec)
    row = next(row for row in alone(packs[0]) if len(row.image_row))
    images = tuple(decode_rgb(store.read(index)) for index in row.image_row.tolist())
    theirs = batches.inputs([row])
    encoded = Encoded(row.input_ids, row.modality, row.instance, row.generated)
    ours = stage_inputs(spec, get_policy("mma"), Prompt(encoded, images))
    assert torch.equal(stage.embed(ours), stage.embed(theirs))


def damaged(row: PackRow, place: tuple[int, int], value: int) -> PackRow:
    assert row.media is not None
    media = row.media.copy()
    media[place] = value
    return replace(row, media=media)


@pytest.mark.parametrize(("column", "value"), [(0, 2), (3, 99), (4, 77), (5, 9999), (6, 0)])
def test_a_damaged_table_is_refused_before_pixels_are_made(packs: PackReader, column: int, value: int) -> None:
    row = next(row for row in packs if len(row.image_row))
    packs._check_bounds(row, 0)
    with pytest.raises(UserError, match="column media"):
        packs._check_bounds(damaged(row, (0, column), value), 0)


def test_a_saved_model_keeps_how_it_reads_images(packs: PackReader) -> None:
    spec = spec_for(packs)
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.media == packs.manifest.media and again.media_spec == packs.manifest.media_spec


def test_a_policy_that_needs_one_grid_is_refused(packs: PackReader) -> None:
    with pytest.raises(UserError, match="images of different sizes"):
        get_policy("cca", grid=spec_for(packs).mask_grid)


def test_tiles_of_another_size_than_the_tower_are_refused(tmp_path: Path) -> None:
    packs = make_world(tmp_path, {"image": {**ANYRES["image"], "tile_px": 24}})
    with pytest.raises(ConfigError, match="a tile has 24 in the packs"):
        spec_for(packs)


def test_views_are_tiles_and_a_thumbnail(tmp_path: Path) -> None:
    packs = make_world(tmp_path, ANYRES)
    spec, store = spec_for(packs), ImageStore(packs.directory / packs.manifest.image_store)
    row = next(row for row in packs if len(row.image_row))
    pixels = source(packs, spec).inputs([row]).pixels
    expected = []
    assert row.media is not None
    for index, extent in zip(row.image_row.tolist(), extents(row.media), strict=True):
        image, (rows, columns) = decode_rgb(store.read(index)), extent.view
        whole = image.resize((16 * columns, 16 * rows), Image.Resampling.BICUBIC)
        boxes = [(16 * c, 16 * r, 16 * c + 16, 16 * r + 16) for r in range(rows) for c in range(columns)]
        views = [*(whole.crop(box) for box in boxes), *([image] if rows * columns > 1 else [])]
        expected += [spec.preprocess.batch([view]) for view in views]
    assert pixels is not None and torch.equal(spec.preprocess.normalize(pixels), torch.cat(expected))


def test_packs_of_version_2_are_read(small_demo: Path, tmp_path: Path) -> None:
    """One size of image is the special case: the same rows, without a table."""
    now = PackReader(small_demo / "packs/eval")
    old = tmp_path / "packs/eval"
    old.mkdir(parents=True)
    (tmp_path / "images").symlink_to(small_demo / "images")
    for path in now.directory.iterdir():
        (old / path.name).symlink_to(path)
    raw = json.loads((old / "manifest.json").read_text())
    assert raw.pop("media") is None and raw.pop("media_tokens") is None
    for name in ("manifest.json", "manifest.sha256"):
        (old / name).unlink()
    (old / "manifest.json").write_text(json.dumps({**raw, "version": 2}))
    (old / "manifest.sha256").write_bytes(sha256_line(sha256_file(old / "manifest.json"), "manifest.json"))
    then = PackReader(old, verify=True)
    assert then.manifest == now.manifest and then.manifest.media_spec == now.manifest.media_spec
    assert then[0].media is None and np.array_equal(then[0].input_ids, now[0].input_ids)
