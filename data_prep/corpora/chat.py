"""Conversations from any JSON-lines or Parquet files, by naming their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field, field_validator

from data_prep.corpora.base import RawFolder, Row, RowCorpus, as_row
from data_prep.corpora.conversation import MARKER, Spoken, check_order, insert_images
from data_prep.corpora.fields import Pattern, clean, find_image, key_text, matching_files, require, text
from data_prep.corpora.parquet import ParquetRows
from data_prep.corpora.tables import Chain, json_lines
from data_prep.example import Example, ImageRef, Role
from data_prep.quarantine import BadSample

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Chat(RowCorpus):
    """A row is a conversation: a list of messages with a role and a content, and the images it speaks of.

    A content is text, in which ``<image>`` marks the place of an image, or a list of ``{type: text, text}`` and
    ``{type: image}`` parts. Images are names of files, or bytes as Hugging Face ``datasets`` writes them:
    ``{bytes, path}``.
    """

    data: Pattern
    """The ``.jsonl`` or ``.parquet`` files, as a glob pattern."""
    messages_column: str = "messages"
    """Column of the messages."""
    images_column: str | None = None
    """Column of the image or images; none for text alone."""
    id_column: str | None = None
    """Column of the ids; without it the number of the row is its id."""
    role_key: str = "role"
    """Key of a message's role."""
    content_key: str = "content"
    """Key of a message's content."""
    roles: dict[str, Role] = Field(default=ROLES)
    """What the files call the system, the user and the assistant."""
    images: RawFolder = Path()
    """Folder of images that are given by name."""

    @field_validator("data")
    @classmethod
    def _known_format(cls, pattern: str) -> str:
        if Path(pattern).suffix not in (".jsonl", ".parquet"):
            raise ValueError("must end in .jsonl or .parquet")
        return pattern

    def files(self) -> Sequence[Path]:
        """Return the data files by name."""
        return matching_files(self.root, "data", self.data)

    def read_rows(self) -> Sequence[object]:
        """Index the files; conversations are read when needed."""
        return self._tables([self.messages_column, self.images_column, self.id_column])

    def rows_with_ids(self) -> Iterable[object]:
        """Return the id column alone: reading all images to compare ids would take hours."""
        return self._tables([self.id_column]) if self.id_column else ()

    def _tables(self, columns: Sequence[str | None]) -> Chain:
        wanted = [column for column in columns if column is not None]
        return Chain(
            [ParquetRows(path, wanted) if path.suffix == ".parquet" else json_lines(path) for path in self.files()]
        )

    def row_id(self, row: Row) -> str:
        """Return the id, if the files have any."""
        return key_text(row, self.id_column) if self.id_column else ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        spoken = [self._spoken(as_row(message)) for message in require(row, self.messages_column, list)]
        check_order(spoken)
        pictures = row.get(self.images_column) if self.images_column else None
        listed = pictures if isinstance(pictures, list) else [] if pictures is None else [pictures]
        images = [self._image(picture, f"{sample}/{number}") for number, picture in enumerate(listed)]
        yield Example(sample, insert_images(spoken, images))

    def _spoken(self, message: Row) -> Spoken:
        speaker = require(message, self.role_key, str)
        if speaker not in self.roles:
            raise BadSample("bad-label", f"'{self.role_key}' is {speaker!r}, expected {' or '.join(self.roles)}")
        role = self.roles[speaker]
        content = message.get(self.content_key)
        if isinstance(content, list):
            message = {**message, self.content_key: "\n".join(_part(as_row(part)) for part in content)}
        return Spoken(role, text(message, self.content_key, empty="no-answer" if role == "assistant" else "empty-text"))

    def _image(self, value: object, name: str) -> ImageRef:
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            return ImageRef(name, data=data)
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str):
            raise BadSample("missing-image", f"image {name} has neither bytes nor a file name")
        return find_image(self.root / self.images, path)


def _part(part: Row) -> str:
    """Return a part of a content as marked text."""
    kind = require(part, "type", str)
    if kind == "text":
        return clean(require(part, "text", str), "text")
    if kind == "image":
        return MARKER
    raise BadSample("bad-label", f"a part is of type {kind!r}, expected text or image")
