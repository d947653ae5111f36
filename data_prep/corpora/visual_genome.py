"""Visual Genome: short descriptions of boxed regions, about fifty per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from data_prep.common.errors import UserError
from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, as_row, example_or_reject
from data_prep.corpora.fields import (
    fill,
    find_image,
    normalised_box,
    placeholder,
    question_example,
    require,
    require_id,
    require_text,
)
from data_prep.corpora.json_files import json_array
from data_prep.corpora.refcoco import DESCRIBE_REGION
from data_prep.example import Example, ImageRef, Reject
from data_prep.quarantine import BadSample


class VisualGenome(RowCorpus):
    """Rows ``[{id, regions: [{region_id, phrase, x, y, width, height}]}]``; each region is its own example.

    The file has 5.4 million regions and is streamed, never loaded whole.
    """

    rows_per_shard: ClassVar[int] = 512  # images, about 25 thousand regions

    regions: RawFile = Path("region_descriptions.json")
    """JSON file with the regions of each image, as published."""
    image_data: RawFile = Path("image_data.json")
    """JSON file ``[{image_id, width, height, url}]``: each image's size and location."""
    images: RawFolder = Path()
    """Folder that holds ``VG_100K`` and ``VG_100K_2``; an image's path is the last two parts of its URL."""
    prompt: Annotated[str, placeholder("box")] = DESCRIBE_REGION
    """User turn. ``{box}`` becomes the region's box."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "boxes refer to the whole, upright image"

    def read_rows(self) -> Sequence[object]:
        """Index the file; the regions of an image are parsed when they are needed."""
        return json_array(self.root / self.regions)

    @cached_property
    def _image_data(self) -> dict[object, Mapping[str, object]]:
        path = self.root / self.image_data
        entries = [
            entry for entry in json_array(path) if isinstance(entry, Mapping) and isinstance(entry.get("image_id"), int)
        ]
        if not entries:
            raise UserError(f"{path}: no entry has an 'image_id'; is this image_data.json?")
        return {entry["image_id"]: entry for entry in entries}

    def row_id(self, row: Row) -> str:
        """Return the image's id."""
        return require_id(row, "id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example | Reject]:
        """Return one example per region of the image, with the id ``IMAGE-REGION``."""
        about = self._image_data.get(row["id"])
        if about is None:
            raise BadSample("missing-image", f"image {row['id']} is not in {self.image_data}")
        image = find_image(self.root / self.images, "/".join(_url_parts(require_text(about, "url"))[-2:]))
        size = require(about, "width", int), require(about, "height", int)
        image = replace(image, annotated_size=size)
        seen: set[str] = set()
        for number, region in enumerate(require(row, "regions", list)):
            one = f"{sample}-{_region_id(region, number)}"
            yield example_or_reject(one, partial(self._example, one, image, size, region, repeated=one in seen))
            seen.add(one)

    def _example(
        self, sample: str, image: ImageRef, size: tuple[int, int], value: object, *, repeated: bool
    ) -> Example:
        region = as_row(value)
        if repeated:
            raise BadSample("duplicate-id", "an earlier region of the image has this id")
        xywh = [require(region, key, int, float) for key in ("x", "y", "width", "height")]
        phrase = require_text(region, "phrase")
        asked = fill(self.prompt, box=str(normalised_box(xywh, *size)))
        return question_example(sample, [image], asked, phrase)


def _region_id(region: object, number: int) -> str:
    identifier = region.get("region_id") if isinstance(region, Mapping) else None
    return str(identifier) if isinstance(identifier, int) else f"row-{number}"


def _url_parts(url: str) -> tuple[str, ...]:
    return PurePosixPath(urlsplit(url).path).parts
