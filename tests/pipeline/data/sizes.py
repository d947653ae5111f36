"""A small world of images of many shapes, in one row with text, and packed rows cut into their samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.packs import PackReader, PackRow
from tests.data_prep.raw import make_recipe, prepare

SIZES = [(16, 16), (64, 9), (9, 64), (40, 24), (5, 5), (100, 30), (33, 70), (2, 90)]


def make_world(folder: Path, media: dict[str, Any], **pack: Any) -> PackReader:
    """Pack conversations about images of all sizes, and some without an image."""
    images = folder / "raw/images"
    images.mkdir(parents=True)
    generator, rows = np.random.default_rng(1), []
    for number in range(24):
        row: dict[str, Any] = {"id": f"talk{number}"}
        said = f"what is {number}?"
        if number % 4:
            width, height = SIZES[number % len(SIZES)]
            row["image"] = f"{number}.png"
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / row["image"])
            said = f"<image>\n{said}"
        row["conversations"] = [{"from": "human", "value": said}, {"from": "gpt", "value": f"it is {number}."}]
        rows.append(row)
    (folder / "raw/llava.json").write_text(json.dumps(rows))
    recipe = make_recipe(
        folder,
        image_tokens=None,
        media=media,
        corpora={"talk": {"type": "llava", "conversations": "llava.json", "images": "images"}},
        packs={"sft": {"corpora": ["talk"], "template": "plain", "seq_len": 160, "epochs": 1, **pack}},
    )
    prepare(recipe)
    return PackReader(folder / "out/packs/sft", verify=True)


def alone(row: PackRow) -> Iterator[PackRow]:
    """Yield the samples of a row as rows of their own, without padding."""
    for number in range(1, int(row.segment.max()) + 1):
        own = row.segment == number
        media = np.unique(row.instance[own & (row.instance >= 0)])
        instance = np.where(row.instance[own] >= 0, np.searchsorted(media, row.instance[own]), -1)
        columns = {name: getattr(row, name)[own] for name in ("input_ids", "modality", "generated")}
        yield replace(
            row, **columns,
            segment=np.ones(int(own.sum()), dtype=np.int32), instance=instance.astype(np.int16),
            image_row=row.image_row[media], media=None if row.media is None else row.media[media],
        )  # fmt: skip
