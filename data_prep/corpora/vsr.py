"""VSR: whether a spatial statement about two objects is true of a COCO image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.downloads import find_first_image
from data_prep.corpora.fields import clean_text, fill, placeholder, question_example, require, require_text
from data_prep.corpora.json_files import json_rows
from data_prep.corpora.vqav2 import SHORT_ANSWER
from data_prep.example import Example
from data_prep.quarantine import BadSample

COCO_FOLDERS = ("train2017", "val2017")
PROMPT = 'Is it true that "{caption}"? Please answer yes or no.'


class VSR(RowCorpus):
    """Lines ``{image, caption, label, relation, ...}``; the family is the relation.

    The statement is quoted whole. The released AKI turns it into a question by splitting it at "is", also inside words,
    which garbles about one in three; that is not reproduced.
    """

    statements: RawFile = Path("train.jsonl")
    """JSON-lines file of one split."""
    images: RawFolder = Path("images")
    """Folder of the COCO 2017 images. Every split needs images of both ``train2017`` and ``val2017``: set a folder that
    contains these two (``image_link`` tells which), or one folder with the images of both."""
    prompt: Annotated[str, placeholder("caption")] | None = None
    """User turn. ``{caption}`` becomes the statement without its full stop. Default: whether it is true, yes or no;
    with ``aki_parity``, the same after the released AKI's request for a single word or phrase."""
    aki_parity: bool = False
    """Ask as the released AKI does, see ``prompt``. Set by ``aki_parity`` of the pack set."""
    answers: tuple[str, str] = ("yes", "no")
    """Answers for a true and for a false statement."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its statements are about positions and directions"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_rows(self.root / self.statements)

    def row_id(self, row: Row) -> str:
        """Return the image's name and a hash of the statement, since the format has no ids."""
        statement = require_text(row, "caption")
        return f"{Path(require_text(row, 'image')).stem}-{xxhash.xxh32_hexdigest(statement.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the statement with yes or no."""
        label = require(row, "label", int)
        if label not in (0, 1):
            raise BadSample("bad-label", f"label is {label}, expected 0 or 1")
        image = find_first_image(self.root / self.images, _file_names(row))
        default = fill(SHORT_ANSWER, question=PROMPT) if self.aki_parity else PROMPT
        question = fill(self.prompt or default, caption=require_text(row, "caption").rstrip("."))
        family = require_text(row, "relation") if "relation" in row else ""
        yield question_example(sample, [image], question, self.answers[0 if label else 1], family=family)


def _file_names(row: Row) -> list[str]:
    """Return where the image may lie: in the COCO folder that its link names, or beside the images of both."""
    name = require_text(row, "image")
    link = row.get("image_link")
    folder = PurePosixPath(urlsplit(clean_text(link, "image_link")).path).parent.name if isinstance(link, str) else ""
    return [f"{folder}/{name}", name] if folder in COCO_FOLDERS else [name]
