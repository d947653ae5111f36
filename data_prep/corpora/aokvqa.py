"""A-OKVQA: multiple-choice questions that need world knowledge, about COCO 2017 images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row
from data_prep.corpora.choices import LETTER_ANSWER, ChoiceCorpus, read_options
from data_prep.corpora.fields import fill, find_image, placeholder, question_example, require, require_id, require_text
from data_prep.corpora.json_files import json_rows
from data_prep.example import Example

PROMPT, AKI_PROMPT = LETTER_ANSWER + "{question}\n{options}", LETTER_ANSWER + "{question}\nOptions:\n{options}\n"


class AOKVQA(ChoiceCorpus):
    """Rows ``[{question_id, image_id, question, choices, correct_choice_idx, ...}]``; the answer is a letter."""

    questions: RawFile = Path("aokvqa_v1p0_train.json")
    """JSON file with the questions of one split, as published."""
    images: RawFolder = Path("train2017")
    """Folder of the COCO 2017 images; a file is named ``%012d.jpg`` after its ``image_id``."""
    prompt: Annotated[str, placeholder("question", "options")] | None = None
    """User turn. ``{question}`` becomes the question, ``{options}`` its lettered options, one per line. Default: a
    request for the option's letter, the question and its options; with ``aki_parity``, the released AKI's form, with
    ``Options:`` before the options and a line end after them."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; a question is parsed when it is needed."""
        return json_rows(self.root / self.questions)

    def row_id(self, row: Row) -> str:
        """Return the question_id."""
        return require_id(row, "question_id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its options and its image."""
        question, options = require_text(row, "question"), read_options(row, "choices", "correct_choice_idx")
        image = find_image(self.root / self.images, f"{require(row, 'image_id', int):012d}.jpg")
        prompt = self.prompt or (AKI_PROMPT if self.aki_parity else PROMPT)
        for name, shown in self.variants(options, sample):
            asked = fill(prompt, question=question, options=str(shown))
            yield question_example(name, [image], asked, shown.answer)
