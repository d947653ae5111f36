"""A-OKVQA: multiple-choice questions that need knowledge of the world; COCO 2017 images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.choices import LETTER_ANSWER, read_options, shuffled
from data_prep.corpora.fields import ask, find_image, key_text, require, slot, text
from data_prep.corpora.tables import json_array
from data_prep.example import Example


class AOKVQA(RowCorpus):
    """``[{question_id, image_id, question, choices, correct_choice_idx, ...}]``; the answer is the option's letter."""

    questions: RawFile = Path("aokvqa_v1p0_train.json")
    """The questions of a split."""
    images: RawFolder = Path("train2017")
    """Folder of the images, ``%012d.jpg``."""
    shuffle: bool = True
    """Show the options in an order drawn from the question's id; the answer's letter follows."""
    prompt: Annotated[str, slot("question")] = LETTER_ANSWER
    """What the user says; ``{question}`` is the question and, line by line, its options. The default is AKI's."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; questions are read when needed."""
        return json_array(self.root / self.questions)

    def row_id(self, row: Row) -> str:
        """Return the question_id."""
        return key_text(row, "question_id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its options about its image."""
        question, options = text(row, "question"), read_options(row, "choices", "correct_choice_idx")
        if self.shuffle:
            options = shuffled(options, sample)
        image = find_image(self.root / self.images, f"{require(row, 'image_id', int):012d}.jpg")
        yield ask(sample, [image], self.prompt.replace("{question}", f"{question}\n{options}"), options.answer)
