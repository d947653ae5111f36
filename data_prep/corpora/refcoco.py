"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's COCO format: one referring expression an image entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import ask, find_image, key_text, normalised_box, require, slot, text
from data_prep.corpora.tables import load_list
from data_prep.example import Example
from data_prep.quarantine import BadSample

DESCRIBE_REGION = "Provide a short description for this region. {box}"
LOCATE = "Provide the bounding box of the region this phrase describes: {phrase}"
Direction = Literal["phrase", "box", "both"]


class RefCOCO(RowCorpus):
    """Expressions and boxes, asked in one direction or both; the family is what is asked for.

    Boxes are written as fractions of the image with three decimals, clipped to it.
    """

    annotations: RawFile = Path("finetune_refcoco_train.json")
    """``{"images": [{id, file_name, width, height, caption}], "annotations": [{image_id, bbox}]}``, bbox x, y, w, h."""
    images: RawFolder = Path("train2014")
    """Folder of the images."""
    direction: Direction = "phrase"
    """``phrase``: box -> phrase (AKI's); ``box``: phrase -> box; ``both``: two examples a row."""
    phrase_prompt: Annotated[str, slot("box")] = DESCRIBE_REGION
    """What the user says when the phrase is asked for."""
    box_prompt: Annotated[str, slot("phrase")] = LOCATE
    """What the user says when the box is asked for."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are."""
        return "boxes refer to the whole, upright image"

    def read_rows(self) -> Sequence[object]:
        """Give every expression the boxes that its annotations draw."""
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
        """Return the id of the expression."""
        return key_text(row, "id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return one example for each direction asked for."""
        phrase = text(row, "caption")
        if len(row["boxes"]) != 1:
            raise BadSample("bad-box", f"an expression needs one box, found {len(row['boxes'])}")
        xywh = row["boxes"][0]
        if not isinstance(xywh, list):
            raise BadSample("bad-box", "the annotation's 'bbox' is no list of four numbers")
        size = require(row, "width", int, float), require(row, "height", int, float)
        box = str(normalised_box(xywh, *size))
        image = replace(find_image(self.root / self.images, require(row, "file_name", str)), annotated_size=size)
        if self.direction != "box":
            yield ask(f"{sample}/phrase", [image], self.phrase_prompt.replace("{box}", box), phrase, family="phrase")
        if self.direction != "phrase":
            yield ask(f"{sample}/box", [image], self.box_prompt.replace("{phrase}", phrase), box, family="box")
