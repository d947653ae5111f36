"""ScienceQA: multiple-choice school questions, half of them without an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.choices import LETTER_ANSWER, read_options, shuffled
from data_prep.corpora.fields import ask, clean, find_image, member, require, slot, text
from data_prep.corpora.tables import json_members
from data_prep.example import Example


class ScienceQA(RowCorpus):
    """``{PID: {question, choices, answer, hint, image, split, subject, ...}}``; the family is the subject.

    The hint, where there is one, stands before the question; an image is ``PID/image.png``.
    """

    problems: RawFile = Path("problems.json")
    """The problems of all splits."""
    images: RawFolder = Path("train")
    """Folder of the split's images."""
    split: Literal["train", "val", "test", "minitrain", "minival", "minitest"] = "train"
    """Which problems to use."""
    only_images: bool = False
    """Leave out the problems without an image."""
    shuffle: bool = True
    """Show the options in an order drawn from the problem's id; the answer's letter follows."""
    prompt: Annotated[str, slot("question")] = LETTER_ANSWER
    """What the user says; ``{question}`` is the hint, the question and, line by line, its options."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are."""
        return "its maps and diagrams carry written labels"

    def read_rows(self) -> Sequence[object]:
        """Index the file; problems are read when needed."""
        return json_members(self.root / self.problems)

    def row_id(self, row: Row) -> str:
        """Return the problem's id, the key of its entry."""
        return member(row)[0]

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the problem, with its image if it has one."""
        _, problem = member(row)
        if text(problem, "split") != self.split or (self.only_images and not problem.get("image")):
            return
        question, options = text(problem, "question"), read_options(problem, "choices", "answer")
        if self.shuffle:
            options = shuffled(options, sample)
        hint = clean(require(problem, "hint", str), "hint") if problem.get("hint") else ""
        asked = "\n".join(part for part in (hint, question, str(options)) if part)
        images = []
        if problem.get("image"):
            images = [find_image(self.root / self.images, f"{sample}/{require(problem, 'image', str)}")]
        family = text(problem, "subject") if "subject" in problem else ""
        yield ask(sample, images, self.prompt.replace("{question}", asked), options.answer, family=family)
