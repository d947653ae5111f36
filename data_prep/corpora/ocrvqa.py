"""OCR-VQA: questions about book covers, several a cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, attempt
from data_prep.corpora.fields import ask, find_image, member, require, slot, text
from data_prep.corpora.tables import json_members
from data_prep.corpora.vqav2 import SHORT_ANSWER
from data_prep.example import Example, ImageRef, Reject
from data_prep.quarantine import BadSample

SPLITS = {"train": 1, "val": 2, "test": 3}


class OCRVQA(RowCorpus):
    """``{KEY: {imageURL, questions, answers, split, ...}}``; each question is an example of its own.

    An image is ``KEY`` with the suffix of its URL; what the file really holds is found out when it is decoded.
    """

    covers: RawFile = Path("dataset.json")
    """The covers of all splits."""
    images: RawFolder = Path("images")
    """Folder of the images."""
    split: Literal["train", "val", "test"] = "train"
    """Which covers to use."""
    prompt: Annotated[str, slot("question")] = SHORT_ANSWER
    """What the user says; the default is AKI's."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are."""
        return "its questions are about written text"

    def read_rows(self) -> Sequence[object]:
        """Index the file; covers are read when needed."""
        return json_members(self.root / self.covers)

    def row_id(self, row: Row) -> str:
        """Return the cover's key."""
        return member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example | Reject]:
        """Return one example for each question about the cover."""
        key, cover = member(row)
        split = require(cover, "split", int)
        if split not in SPLITS.values():
            raise BadSample("bad-label", f"split is {split}, expected 1, 2 or 3")
        if split != SPLITS[self.split]:
            return
        questions, answers = require(cover, "questions", list), require(cover, "answers", list)
        if len(questions) != len(answers):
            raise BadSample("no-answer", f"{len(questions)} questions and {len(answers)} answers")
        suffix = PurePosixPath(urlsplit(text(cover, "imageURL")).path).suffix
        image = find_image(self.root / self.images, key + suffix)
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            one = f"{sample}-{number}"
            yield attempt(one, partial(self._example, one, image, {"question": question, "answer": answer}))

    def _example(self, sample: str, image: ImageRef, pair: dict[str, Any]) -> Example:
        question, answer = text(pair, "question"), text(pair, "answer", empty="no-answer")
        return ask(sample, [image], self.prompt.replace("{question}", question), answer)
