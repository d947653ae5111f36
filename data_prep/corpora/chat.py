"""Conversations from any JSON, Parquet or Arrow files of a Hugging Face data set or one's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from data_prep.corpora.base import RawFolder, Row, as_row
from data_prep.corpora.conversation import MARKER, MISPLACED, Spoken, check_order, insert_images
from data_prep.corpora.fields import clean, find_image, key_text, require, text
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.parquet import ArrowRows, column_names
from data_prep.corpora.tables import Chain, Rows, json_array, json_lines
from data_prep.example import Example, ImageRef, Role
from data_prep.quarantine import BadSample

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


MESSAGES, IMAGES = ("messages", "conversations", "conversation"), ("images", "image")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
IMAGE_PARTS = ("image", "image_url")
_ADDRESS = re.compile(r"(https?|ftp|s3|gs|data):", re.IGNORECASE)


class Chat(FileCorpus):
    """A row is a conversation: a list of messages with a role and a content, and the images it speaks of.

    A content is text, in which ``<image>`` marks the place of an image, or a list of ``{type: text, text}`` and
    ``{type: image}`` parts. Images are names of files, or bytes as Hugging Face ``datasets`` writes them:
    ``{bytes, path}``; they stand in a column of the row, in order, or in the parts themselves (``image``, ``path``,
    ``url`` or ``image_url``). Columns and keys that most data sets use are found; others are named.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json", ".parquet", ".arrow")
    messages_column: str | None = None
    """Column of the messages; without it ``messages``, ``conversations`` or ``conversation``, whichever there is."""
    images_column: str | None = None
    """Column of the image or images; without it ``images`` or ``image``, if there is one."""
    id_column: str | None = None
    """Column of the ids; without it the number of the row is its id."""
    role_key: str | None = None
    """Key of a message's role; without it ``role`` or ``from``."""
    content_key: str | None = None
    """Key of a message's content; without it ``content`` or ``value``."""
    roles: dict[str, Role] = Field(default=ROLES)
    """What the files call the system, the user and the assistant."""
    images: RawFolder = Path()
    """Folder of images that are given by name."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; conversations are read when needed."""
        return Chain([self._table(path, (self._messages, self._images), self.id_column) for path in self.files()])

    def rows_with_ids(self) -> Iterable[object]:
        """Return the id column alone: reading all images to compare ids would take hours."""
        return Chain([self._table(path, (), self.id_column) for path in self.files()]) if self.id_column else ()

    @property
    def _messages(self) -> tuple[str, ...]:
        return (self.messages_column,) if self.messages_column else MESSAGES

    @property
    def _images(self) -> tuple[str, ...]:
        return (self.images_column,) if self.images_column else IMAGES

    def _table(self, path: Path, wanted: Sequence[Sequence[str]], identifier: str | None) -> Rows:
        """Return the rows of a file, with the first of each group of columns that it has."""
        if path.suffix == ".json":
            return json_array(path)  # one list
        if path.suffix == ".jsonl":
            return json_lines(path)
        known = column_names(path)
        columns = [identifier] if identifier else []
        for names in wanted:
            if names == IMAGES and not set(names) & set(known):
                continue  # a data set of text alone
            columns.append(next((name for name in names if name in known), names[0]))
        return self.table(path, columns) if path.suffix == ".parquet" else ArrowRows(path, columns)

    def row_id(self, row: Row) -> str:
        """Return the id, if the files have any."""
        return key_text(row, self.id_column) if self.id_column else ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        inline = list[object]()
        spoken = [self._spoken(as_row(message), inline) for message in require(row, _key(row, self._messages), list)]
        check_order(spoken)
        column = row.get(_key(row, self._images))
        listed = column if isinstance(column, list) else [] if column is None else [column]
        pictures = inline or listed
        images = [self._image(picture, f"{sample}/{number}") for number, picture in enumerate(pictures)]
        yield Example(sample, insert_images(spoken, images))

    def _spoken(self, message: Row, inline: list[object]) -> Spoken:
        """Return a message as marked text; images that its parts bring are added to ``inline``."""
        role_key = self.role_key or _key(message, ROLE_KEYS)
        speaker = require(message, role_key, str)
        if speaker not in self.roles:
            raise BadSample("bad-label", f"'{role_key}' is {speaker!r}, expected {' or '.join(self.roles)}")
        role, key = self.roles[speaker], self.content_key or _key(message, CONTENT_KEYS)
        content = message.get(key)
        if isinstance(content, list):
            parts = [as_row(part) for part in content]
            if role != "user" and any(part.get("type") in IMAGE_PARTS for part in parts):
                raise BadSample("bad-label", MISPLACED)
            message = {**message, key: "\n".join(_part(part, inline) for part in parts)}
        return Spoken(role, text(message, key, empty="no-answer" if role == "assistant" else "empty-text"))

    def _image(self, value: object, name: str) -> ImageRef:
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            return ImageRef(name, data=data)
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str):
            raise BadSample("missing-image", f"image {name} has neither bytes nor a file name")
        if address := _ADDRESS.match(path):
            raise BadSample("missing-image", f"image {name} is a {address[1]}: address: download it and name its file")
        return find_image(self.root / self.images, path)


def _key(row: Row, names: Sequence[str]) -> str:
    """Return the first of some keys under which a row has something, or the first of all, which is then missing."""
    return next((name for name in names if row.get(name) not in (None, [])), names[0])


def _part(part: Row, inline: list[object]) -> str:
    """Return a part of a content as marked text; the image it brings, if it does, is added to ``inline``."""
    kind = require(part, "type", str)
    if kind == "text":
        return clean(require(part, "text", str), "text")
    if kind not in IMAGE_PARTS:
        raise BadSample("bad-label", f"a part is of type {kind!r}, expected text or image")
    brought = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(brought, Mapping) and "url" in brought:
        brought = brought["url"]
    if brought is not None:
        inline.append(brought.removeprefix("file://") if isinstance(brought, str) else brought)
    return MARKER
