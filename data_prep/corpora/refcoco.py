"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's COCO format: one referring expression per image entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
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
from data_prep.corpora.tables import load_list
from data_prep.example import Example
from data_prep.quarantine import BadSample

DESCRIBE_REGION = "Provide a short description for this region. {box}"
LOCATE = "Provide the bounding box of the region this phrase describes: {phrase}"
Direction = Literal["phrase", "box", "both"]


class RefCOCO(RowCorpus):
    """Referring expressions and boxes, asked in one direction or both; the family is ``phrase`` or ``box``.

    A box is written as fractions of the image's sides with three decimals, clipped to the image.
    """

    annotations: RawFile = Path("finetune_refcoco_train.json")
    """JSON file ``{"images": [{id, file_name, width, height, caption}], "annotations": [{image_id, bbox}]}``; a bbox
    is x, y, width, height in pixels."""
    images: RawFolder = Path("train2014")
    """Folder of the COCO 2014 images, named by ``file_name``."""
    direction: Direction = "phrase"
    """``phrase``: the box is given, the phrase is the answer (as AKI does). ``box``: the reverse. ``both``: two
    examples per row."""
    phrase_prompt: Annotated[str, placeholder("box")] = DESCRIBE_REGION
    """User turn that asks for the phrase. ``{box}`` becomes the box."""
    box_prompt: Annotated[str, placeholder("phrase")] = LOCATE
    """User turn that asks for the box. ``{phrase}`` becomes the phrase."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "boxes refer to the whole, upright image"

    def read_rows(self) -> Sequence[object]:
        """Join every expression with the boxes of its annotations."""
        path = self.root / self.annotations
        boxes: dict[object, list[object]] = {}
        for annotation in load_list(path, "annotations"):
            if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
                boxes.setdefault(annotation["image_id"], []).append(annotation.get("bbox"))
        return [
            {**image, "boxes": boxes.get(image["id"], [])}
            if isinstance(image, dict) and isinstance(image.get("id"), int | str)
            else image
            for image in load_list(path, "images")
        ]

    def row_id(self, row: Row) -> str:
        """Return the expression's id."""
        return require_id(row, "id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return one example per requested direction."""
        phrase = require_text(row, "caption")
        if len(row["boxes"]) != 1:
            raise BadSample("bad-box", f"an expression needs one box, found {len(row['boxes'])}")
        xywh = row["boxes"][0]
        if not isinstance(xywh, list):
            raise BadSample("bad-box", "the annotation's 'bbox' is not a list of four numbers")
        size = require(row, "width", int, float), require(row, "height", int, float)
        box = str(normalised_box(xywh, *size))
        image = replace(find_image(self.root / self.images, require(row, "file_name", str)), annotated_size=size)
        if self.direction != "box":
            asked = fill(self.phrase_prompt, box=box)
            yield question_example(f"{sample}/phrase", [image], asked, phrase, family="phrase")
        if self.direction != "phrase":
            asked = fill(self.box_prompt, phrase=phrase)
            yield question_example(f"{sample}/box", [image], asked, box, family="box")
