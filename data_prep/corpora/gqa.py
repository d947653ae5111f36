"""GQA: compositional questions about Visual Genome images, an object of questions by id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import ask, find_image, key_text, member, slot, text
from data_prep.corpora.tables import json_members
from data_prep.corpora.vqav2 import SHORT_ANSWER
from data_prep.example import Example


class GQA(RowCorpus):
    """``{ID: {question, imageId, answer, types, ...}}``; the family is the structural type (query, verify, ...)."""

    questions: RawFile = Path("train_balanced_questions.json")
    """The questions of a split."""
    images: RawFolder = Path("images")
    """Folder of the images, ``IMAGEID.jpg``."""
    prompt: Annotated[str, slot("question")] = SHORT_ANSWER
    """What the user says; the default is AKI's."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; questions are read when needed."""
        return json_members(self.root / self.questions)

    def row_id(self, row: Row) -> str:
        """Return the question's id, the key of its entry."""
        return member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question about its image with its short answer."""
        _, entry = member(row)
        question, answer = text(entry, "question"), text(entry, "answer", empty="no-answer")
        image = find_image(self.root / self.images, f"{key_text(entry, 'imageId')}.jpg")
        types = entry.get("types")
        family = text(types, "structural") if isinstance(types, Mapping) and "structural" in types else ""
        yield ask(sample, [image], self.prompt.replace("{question}", question), answer, family=family)
