"""Tokens from headers: equal to those of the processors that published models come with, for images of any size."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from pydantic import ValidationError
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from data_prep.common.modalities import IMAGE
from data_prep.media.native import fill_budget, keep_size
from data_prep.media.spec import AnyresImages, Extent, FixedImages, Header, MediaSpec, NativeImages, extents
from data_prep.media.tiles import by_aspect, by_resolution, grids_up_to

LLAVA_NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
EDGES = [(1, 1), (1, 8000), (8000, 1), (8000, 300), (300, 8000), (448, 448), (672, 336), (640, 480), (2, 3)]
_random = random.Random(5)
SIZES = EDGES + [(_random.randint(1, 8000), _random.randint(1, 300)) for _ in range(100)]
SIZES += [(_random.randint(1, 2000), _random.randint(1, 2000)) for _ in range(200)]
SPECS = {
    "fixed": FixedImages(tokens=9),
    "internvl": AnyresImages(kind="anyres", tokens=4, tile_px=448, thumbnail="last"),
    "llava": AnyresImages(kind="anyres", tokens=4, tile_px=336, grids=LLAVA_NEXT, choose="resolution"),
    "tiles alone": AnyresImages(kind="anyres", tokens=4, tile_px=64, max_tiles=6, thumbnail="none"),
    "naflex": NativeImages(kind="native", patch_px=16),
    "merged": NativeImages(kind="native", patch_px=14, merge=2, max_tokens=64),
    "qwen": NativeImages(kind="native", patch_px=14, merge=2, min_tokens=4, max_tokens=128, resize="size"),
}


def test_grids_are_those_of_internvl() -> None:
    for most in (1, 6, 12, 40):
        assert [(columns, rows) for rows, columns in grids_up_to(most)] == get_all_supported_aspect_ratios(1, most)


@pytest.mark.parametrize(("tile_px", "most"), [(448, 12), (336, 6)])
def test_the_nearest_aspect_is_that_of_internvl(tile_px: int, most: int) -> None:
    for width, height in SIZES:
        columns, rows = get_optimal_tiled_canvas((height, width), (tile_px, tile_px), 1, most)
        assert by_aspect((width, height), grids_up_to(most), tile_px) == (rows, columns), (width, height)


@pytest.mark.parametrize("tile_px", [336, 384])
def test_the_best_resolution_is_that_of_llava_next(tile_px: int) -> None:
    pinpoints = [(rows * tile_px, columns * tile_px) for rows, columns in LLAVA_NEXT]
    for width, height in SIZES:
        best = select_best_resolution((height, width), pinpoints) or pinpoints[0]
        assert by_resolution((width, height), LLAVA_NEXT, tile_px) == tuple(side // tile_px for side in best)


@pytest.mark.parametrize(("patch_px", "most"), [(16, 256), (14, 1024)])
def test_the_budget_is_filled_as_by_siglip2(patch_px: int, most: int) -> None:
    for width, height in SIZES:
        sides = get_image_size_for_max_num_patches(height, width, patch_px, most)
        assert fill_budget((width, height), patch_px, most) == tuple(side // patch_px for side in sides)


def test_own_sizes_are_those_of_qwen() -> None:
    for width, height in SIZES:
        if max(width, height) > 200 * min(width, height):  # refused by Qwen
            continue
        rows, columns = (side // 28 for side in smart_resize(height, width, 28, 4 * 28**2, 1280 * 28**2))
        assert keep_size((width, height), 28, 4, 1280) == (rows, columns) or rows * columns > 1280


@pytest.mark.parametrize(("least", "most"), [(250, 250), (200, 200), (1, 1), (3, 7), (127, 128)])
def test_images_that_grow_stay_within_the_most_tokens(least: int, most: int) -> None:
    for size in [*SIZES, (10, 10), (11, 9)]:
        rows, columns = keep_size(size, 28, least, most)
        assert 1 <= rows * columns <= most


@pytest.mark.parametrize("name", SPECS)
def test_every_size_has_an_extent_that_the_reader_of_packs_accepts(name: str) -> None:
    image = SPECS[name]
    spec = MediaSpec(image=image)
    table = spec.table([Header(*size) for size in SIZES])
    for size, extent in zip(SIZES, extents(table), strict=True):
        assert extent == image.extent(Header(*size)) and image.fits(extent)
        time, rows, columns = extent.grid
        assert extent.tokens == time * rows * columns or extent.grid == (0, 0, 0)
        assert image.view_tokens == 0 or extent.tokens % image.view_tokens == 0
        assert 0 < extent.tokens <= image.most_tokens
    assert set(table[:, 0]) == {IMAGE} and MediaSpec.model_validate(spec.model_dump(mode="json")) == spec


def _changed(extent: Extent, **values: object) -> Extent:
    return extent._replace(**values)


@pytest.mark.parametrize(
    "change",
    [
        partial(_changed, tokens=7),
        partial(_changed, view=(99, 1)),
        partial(_changed, view=(0, 1)),
        partial(_changed, grid=(1, 1, 1)),
    ],
)
@pytest.mark.parametrize("name", SPECS)
def test_other_extents_are_refused(change: Callable[[Extent], Extent], name: str) -> None:
    assert not SPECS[name].fits(change(SPECS[name].extent(Header(640, 480))))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"kind": "anyres", "tokens": 1 << 19, "tile_px": 8}, "lower max_tiles"),
        ({"kind": "anyres", "tokens": 1, "tile_px": 8, "grids": [[100, 100]]}, "more than 1024 tiles"),
        ({"kind": "native", "patch_px": 16, "min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above"),
        ({"kind": "tiles"}, "tag"),
    ],
)
def test_impossible_specs_are_refused(raw: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MediaSpec.model_validate({"image": raw})
