"""ScienceQA: multiple-choice school questions, half of them without an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.choices import LETTER_ANSWER, read_options, shuffle_options
from data_prep.corpora.fields import (
    clean_text,
    find_image,
    placeholder,
    question_example,
    require,
    require_text,
    single_member,
)
from data_prep.corpora.tables import json_members
from data_prep.example import Example


class ScienceQA(RowCorpus):
    """Rows ``{PID: {question, choices, answer, hint, image, split, subject, ...}}``; the family is the subject.

    A hint precedes its question. An image is ``PID/image.png``.
    """

    problems: RawFile = Path("problems.json")
    """JSON file with the problems of all splits, as published."""
    images: RawFolder = Path("train")
    """Folder of the split's images."""
    split: Literal["train", "val", "test", "minitrain", "minival", "minitest"] = "train"
    """Split to read; ``images`` must be its folder."""
    only_images: bool = False
    """Skip problems without an image (about half of them)."""
    shuffle: bool = True
    """Shuffle the options, seeded by the problem's id; the answer letter follows its option."""
    prompt: Annotated[str, placeholder("question")] = LETTER_ANSWER
    """User turn. ``{question}`` becomes the hint, the question and its options, one per line."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its maps and diagrams carry written labels"

    def read_rows(self) -> Sequence[object]:
        """Index the file; a problem is parsed when it is needed."""
        return json_members(self.root / self.problems)

    def row_id(self, row: Row) -> str:
        """Return the problem's id, which is the key of its entry."""
        return single_member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the problem, with its image if it has one."""
        _, problem = single_member(row)
        if require_text(problem, "split") != self.split or (self.only_images and not problem.get("image")):
            return
        question, options = require_text(problem, "question"), read_options(problem, "choices", "answer")
        if self.shuffle:
            options = shuffle_options(options, sample)
        hint = clean_text(require(problem, "hint", str), "hint") if problem.get("hint") else ""
        asked = "\n".join(part for part in (hint, question, str(options)) if part)
        images = []
        if problem.get("image"):
            images = [find_image(self.root / self.images, f"{sample}/{require(problem, 'image', str)}")]
        family = require_text(problem, "subject") if "subject" in problem else ""
        yield question_example(sample, images, self.prompt.replace("{question}", asked), options.answer, family=family)
