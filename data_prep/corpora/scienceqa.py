"""ScienceQA: multiple-choice school questions, half of them without an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from data_prep.corpora.base import RawFile, RawFolder, Row
from data_prep.corpora.choices import LETTER_ANSWER, ChoiceCorpus, read_options
from data_prep.corpora.fields import (
    clean_text,
    fill,
    find_image,
    placeholder,
    question_example,
    require,
    require_text,
    single_member,
)
from data_prep.corpora.json_files import json_members
from data_prep.example import Example

PROMPT = LETTER_ANSWER + "{hint}{question}\n{options}"
AKI_PROMPT = LETTER_ANSWER + "{question}\nContext: {context}\nOptions:\n{options}\n"


class ScienceQA(ChoiceCorpus):
    """Rows ``{PID: {question, choices, answer, hint, image, split, subject, ...}}``; the family is the subject.

    An image is ``PID/image.png``.
    """

    problems: RawFile = Path("problems.json")
    """JSON file with the problems of all splits, as published."""
    images: RawFolder = Path("train")
    """Folder of the split's images."""
    split: Literal["train", "val", "test", "minitrain", "minival", "minitest"] = "train"
    """Split to read; ``images`` must be its folder."""
    only_images: bool = False
    """Skip problems without an image (about half of them)."""
    prompt: Annotated[str, placeholder("question", "options")] | None = None
    """User turn. ``{question}`` becomes the question and ``{options}`` its lettered options, one per line. ``{hint}``
    becomes the hint and a line end, or nothing; ``{context}`` the hint, or ``N/A``. Default: a request for the option's
    letter, the hint, the question and its options; with ``aki_parity``, the released AKI's form, with ``Context:`` and
    ``Options:``."""

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
        hint = clean_text(require(problem, "hint", str), "hint") if problem.get("hint") else ""
        images = []
        if problem.get("image"):
            images = [find_image(self.root / self.images, f"{sample}/{require(problem, 'image', str)}")]
        family = require_text(problem, "subject") if "subject" in problem else ""
        prompt = self.prompt or (AKI_PROMPT if self.aki_parity else PROMPT)
        about = {"question": question, "hint": hint and f"{hint}\n", "context": hint or "N/A"}
        for name, shown in self.variants(options, sample):
            asked = fill(prompt, **about, options=str(shown))
            yield question_example(name, images, asked, shown.answer, family=family)
