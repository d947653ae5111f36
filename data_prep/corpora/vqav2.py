"""VQAv2: questions and annotations in two files, joined by question_id; COCO images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import fill, find_image, placeholder, question_example, require, require_id, require_text
from data_prep.corpora.tables import load_list
from data_prep.example import Example
from data_prep.quarantine import BadSample

SHORT_ANSWER = "Answer the question using a single word or phrase. {question}"


class VQAv2(RowCorpus):
    """One question per row; the answer is the annotators' most frequent one, the family is ``question_type``."""

    questions: RawFile = Path("v2_OpenEnded_mscoco_train2014_questions.json")
    """JSON file ``{"questions": [{image_id, question, question_id}]}``."""
    annotations: RawFile = Path("v2_mscoco_train2014_annotations.json")
    """JSON file ``{"annotations": [{question_id, multiple_choice_answer, question_type, ...}]}``."""
    images: RawFolder = Path("train2014")
    """Folder of the COCO images."""
    image_prefix: str = "COCO_train2014_"
    """Start of the image file names ``PREFIX%012d.jpg``; set it to "" for COCO 2017 names."""
    prompt: Annotated[str, placeholder("question")] = SHORT_ANSWER
    """User turn. ``{question}`` becomes the question."""

    def read_rows(self) -> Sequence[object]:
        """Join both files; keep only the used keys of an annotation, since its ten answers would fill memory."""
        keep = ("question_id", "multiple_choice_answer", "question_type")
        answers = {
            annotation["question_id"]: annotation
            for annotation in load_list(self.root / self.annotations, "annotations", keep)
            if isinstance(annotation, dict) and isinstance(annotation.get("question_id"), int | str)
        }
        return [
            {**question, **answers.get(question["question_id"], {})}
            if isinstance(question, dict) and isinstance(question.get("question_id"), int | str)
            else question
            for question in load_list(self.root / self.questions, "questions")
        ]

    def row_id(self, row: Row) -> str:
        """Return the question_id."""
        return require_id(row, "question_id")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its image and answer."""
        question = require_text(row, "question")
        if "multiple_choice_answer" not in row:
            raise BadSample("no-answer", "no annotation has this question_id")
        answer = require_text(row, "multiple_choice_answer", empty="no-answer")
        image = find_image(self.root / self.images, f"{self.image_prefix}{require(row, 'image_id', int):012d}.jpg")
        family = require_text(row, "question_type") if "question_type" in row else ""
        yield question_example(sample, [image], fill(self.prompt, question=question), answer, family=family)
