"""GQA: compositional questions about Visual Genome images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import (
    fill,
    find_image,
    placeholder,
    question_example,
    require_id,
    require_text,
    single_member,
)
from data_prep.corpora.json_files import json_members
from data_prep.corpora.vqav2 import SHORT_ANSWER
from data_prep.example import Example


class GQA(RowCorpus):
    """Rows ``{ID: {question, imageId, answer, types, ...}}``; the family is the structural type (query, ...)."""

    questions: RawFile = Path("train_balanced_questions.json")
    """JSON file with the questions of one split, as published."""
    images: RawFolder = Path("images")
    """Folder of the images; a file is named ``IMAGEID.jpg``."""
    prompt: Annotated[str, placeholder("question")] = SHORT_ANSWER
    """User turn. ``{question}`` becomes the question."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; a question is parsed when it is needed."""
        return json_members(self.root / self.questions)

    def row_id(self, row: Row) -> str:
        """Return the question's id, which is the key of its entry."""
        return single_member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its image and short answer."""
        _, entry = single_member(row)
        question, answer = require_text(entry, "question"), require_text(entry, "answer", empty="no-answer")
        image = find_image(self.root / self.images, f"{require_id(entry, 'imageId')}.jpg")
        types = entry.get("types")
        family = require_text(types, "structural") if isinstance(types, Mapping) and "structural" in types else ""
        yield question_example(sample, [image], fill(self.prompt, question=question), answer, family=family)
