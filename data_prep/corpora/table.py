"""Tables of images with a question and an answer, or with a caption: one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.corpora.base import RawFolder, Row
from data_prep.corpora.fields import clean_text, fill, image_of, placeholder, question_example, require_id, require_text
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.tables import Concatenated
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample


class Table(FileCorpus):
    """A row is ``{image, question, answer}``, or ``{image, caption}`` with ``question_column: null``.

    An image is a file name, encoded bytes, or ``{bytes, path}`` as ``datasets`` writes it; a list holds several, which
    all come before the question.
    """

    image_column: str | None = "image"
    """Column of the image or images; null for text only."""
    question_column: str | None = "question"
    """Column of the question; null if the answer is a caption."""
    answer_column: str = "answer"
    """Column of the answer: text, a number, or a list of which the most frequent is used."""
    id_column: str | None = None
    """Column of the ids; default: the row number."""
    images: RawFolder = Path()
    """Folder of images that are given by name."""
    prompt: Annotated[str, placeholder("question")] = "{question}"
    """User turn; ``{question}`` becomes the question."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; a row is parsed when it is needed."""
        named = (self.id_column, self.image_column, self.question_column, self.answer_column)
        columns = [column for column in dict.fromkeys(named) if column is not None]
        return Concatenated([self.table(path, columns) for path in self.files()])

    def rows_with_ids(self) -> Iterable[object]:
        """Return only the id column."""
        return Concatenated([self.table(path, [self.id_column]) for path in self.files()]) if self.id_column else ()

    def row_id(self, row: Row) -> str:
        """Return the id, if ``id_column`` is set."""
        return require_id(row, self.id_column) if self.id_column else ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the question with its answer, or the captioned image. Raises BadSample."""
        images, answer = self._images(row, sample), self._answer(row)
        if self.question_column is None:
            if not images:
                raise BadSample("missing-image", "a caption without an image")
            yield Example(sample, (Turn("user", tuple(images)), Turn("assistant", (answer,))), kind="document")
            return
        question = fill(self.prompt, question=require_text(row, self.question_column))
        yield question_example(sample, images, question, answer)

    def _images(self, row: Row, sample: str) -> list[ImageRef]:
        value = row.get(self.image_column) if self.image_column else None
        cells = value if isinstance(value, list) else [] if value is None else [value]
        return [image_of(cell, f"{sample}/{number}", self.root / self.images) for number, cell in enumerate(cells)]

    def _answer(self, row: Row) -> str:
        value = row.get(self.answer_column)
        given = value if isinstance(value, list) else [value]
        texts = [self._text(item) for item in given]
        if not texts:
            raise BadSample("no-answer", f"'{self.answer_column}' is an empty list")
        return Counter(texts).most_common(1)[0][0]  # among equals the first

    def _text(self, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadSample("no-answer", f"'{self.answer_column}' holds {type(value).__name__}, expected text")
        text = clean_text(str(value), self.answer_column)
        if not text:
            raise BadSample("no-answer", f"'{self.answer_column}' holds no text")
        return text
