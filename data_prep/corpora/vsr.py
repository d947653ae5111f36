"""VSR: is a spatial statement about two objects true of a COCO image?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import ask, find_image, require, slot, text
from data_prep.corpora.tables import json_lines
from data_prep.example import Example
from data_prep.quarantine import BadSample


class VSR(RowCorpus):
    """``{image, caption, label, relation, ...}`` a line; the family is the relation.

    The statement is quoted whole: rewriting it into a question by its verb garbles about every third one.
    """

    statements: RawFile = Path("train.jsonl")
    """The JSON-lines file of a split."""
    images: RawFolder = Path("images")
    """Folder of the COCO images, flat."""
    prompt: Annotated[str, slot("caption")] = 'Is it true that "{caption}"? Please answer yes or no.'
    """What the user says; the statement comes without its full stop."""
    answers: tuple[str, str] = ("yes", "no")
    """The words for a true and for a false statement."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are."""
        return "its statements are about places and directions"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_lines(self.root / self.statements)

    def row_id(self, row: Row) -> str:
        """Return the image's name and a hash of the statement: the format has no ids."""
        statement = text(row, "caption")
        return f"{Path(text(row, 'image')).stem}-{xxhash.xxh32_hexdigest(statement.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the statement with yes or no."""
        label = require(row, "label", int)
        if label not in (0, 1):
            raise BadSample("bad-label", f"label is {label}, expected 0 or 1")
        image = find_image(self.root / self.images, require(row, "image", str))
        question = self.prompt.replace("{caption}", text(row, "caption").rstrip("."))
        family = text(row, "relation") if "relation" in row else ""
        yield ask(sample, [image], question, self.answers[0 if label else 1], family=family)
