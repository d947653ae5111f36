"""OCR-VQA: questions about book covers, several per cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, example_or_reject
from data_prep.corpora.fields import (
    fill,
    find_image,
    placeholder,
    question_example,
    require,
    require_text,
    single_member,
)
from data_prep.corpora.json_files import json_members
from data_prep.corpora.vqav2 import SHORT_ANSWER
from data_prep.example import Example, ImageRef, Reject
from data_prep.quarantine import BadSample

SPLITS = {"train": 1, "val": 2, "test": 3}


class OCRVQA(RowCorpus):
    """Rows ``{KEY: {imageURL, questions, answers, split, ...}}``; each question is its own example.

    An image file is named ``KEY`` plus the suffix of its URL; the suffix may be wrong, since decoding does not use it.
    """

    covers: RawFile = Path("dataset.json")
    """JSON file with the covers of all splits, as published."""
    images: RawFolder = Path("images")
    """Folder of the cover images."""
    split: Literal["train", "val", "test"] = "train"
    """Split of the covers to read."""
    prompt: Annotated[str, placeholder("question")] = SHORT_ANSWER
    """User turn. ``{question}`` becomes the question."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its questions are about written text"

    def read_rows(self) -> Sequence[object]:
        """Index the file; a cover is parsed when it is needed."""
        return json_members(self.root / self.covers)

    def row_id(self, row: Row) -> str:
        """Return the cover's key."""
        return single_member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example | Reject]:
        """Return one example for each question about the cover."""
        key, cover = single_member(row)
        split = require(cover, "split", int)
        if split not in SPLITS.values():
            raise BadSample("bad-label", f"split is {split}, expected 1, 2 or 3")
        if split != SPLITS[self.split]:
            return
        questions, answers = require(cover, "questions", list), require(cover, "answers", list)
        if len(questions) != len(answers):
            raise BadSample("no-answer", f"{len(questions)} questions and {len(answers)} answers")
        suffix = PurePosixPath(urlsplit(require_text(cover, "imageURL")).path).suffix
        image = find_image(self.root / self.images, key + suffix)
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            one = f"{sample}-{number}"
            yield example_or_reject(one, partial(self._example, one, image, {"question": question, "answer": answer}))

    def _example(self, sample: str, image: ImageRef, pair: dict[str, Any]) -> Example:
        question, answer = require_text(pair, "question"), require_text(pair, "answer", empty="no-answer")
        return question_example(sample, [image], fill(self.prompt, question=question), answer)
