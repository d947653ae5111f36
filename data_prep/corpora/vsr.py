"""VSR: whether a spatial statement about two objects is true of a COCO image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import find_image, placeholder, question_example, require, require_text
from data_prep.corpora.tables import json_lines
from data_prep.example import Example
from data_prep.quarantine import BadSample


class VSR(RowCorpus):
    """Lines ``{image, caption, label, relation, ...}``; the family is the relation.

    The statement is quoted whole: turning it into a question by its verb garbles about one in three.
    """

    statements: RawFile = Path("train.jsonl")
    """JSON-lines file of one split."""
    images: RawFolder = Path("images")
    """Folder of the COCO images, without subfolders."""
    prompt: Annotated[str, placeholder("caption")] = 'Is it true that "{caption}"? Please answer yes or no.'
    """User turn. ``{caption}`` becomes the statement without its full stop."""
    answers: tuple[str, str] = ("yes", "no")
    """Answers for a true and for a false statement."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its statements are about positions and directions"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_lines(self.root / self.statements)

    def row_id(self, row: Row) -> str:
        """Return the image's name and a hash of the statement, since the format has no ids."""
        statement = require_text(row, "caption")
        return f"{Path(require_text(row, 'image')).stem}-{xxhash.xxh32_hexdigest(statement.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the statement with yes or no."""
        label = require(row, "label", int)
        if label not in (0, 1):
            raise BadSample("bad-label", f"label is {label}, expected 0 or 1")
        image = find_image(self.root / self.images, require(row, "image", str))
        question = self.prompt.replace("{caption}", require_text(row, "caption").rstrip("."))
        family = require_text(row, "relation") if "relation" in row else ""
        yield question_example(sample, [image], question, self.answers[0 if label else 1], family=family)
