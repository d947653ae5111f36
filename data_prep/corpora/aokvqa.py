"""A-OKVQA: multiple-choice questions that need world knowledge, about COCO 2017 images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.choices import LETTER_ANSWER, read_options, shuffle_options
from data_prep.corpora.fields import find_image, placeholder, question_example, require, require_id, require_text
from data_prep.corpora.tables import json_array
from data_prep.example import Example


class AOKVQA(RowCorpus):
    """Rows ``[{question_id, image_id, question, choices, correct_choice_idx, ...}]``; the answer is a letter."""

    questions: RawFile = Path("aokvqa_v1p0_train.json")
    """JSON file with the questions of one split, as published."""
    images: RawFolder = Path("train2017")
    """Folder of the COCO 2017 images; a file is named ``%012d.jpg`` after its ``image_id``."""
    shuffle: bool = True
    """Shuffle the options, seeded by the question's id; the answer letter follows its option."""
    prompt: Annotated[str, placeholder("question")] = LETTER_ANSWER
    """User turn. ``{question}`` becomes the question followed by its options, one per line."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; a question is parsed when it is needed."""
        return json_array(self.root / self.questions)

    def row_id(self, row: Row) -> str:
        """Return the question_id."""
        return require_id(row, "question_id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its options and its image."""
        question, options = require_text(row, "question"), read_options(row, "choices", "correct_choice_idx")
        if self.shuffle:
            options = shuffle_options(options, sample)
        image = find_image(self.root / self.images, f"{require(row, 'image_id', int):012d}.jpg")
        yield question_example(
            sample, [image], self.prompt.replace("{question}", f"{question}\n{options}"), options.answer
        )
