"""Conversations in JSON, Parquet or Arrow files: Hugging Face datasets, or your own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from data_prep.corpora.base import RawFolder, Row, as_row
from data_prep.corpora.conversation import (
    MARKER,
    MEDIA_KEYS,
    MISPLACED,
    Message,
    Unmarked,
    check_order,
    insert_images,
    refuse_media,
)
from data_prep.corpora.fields import clean_text, image_of, require, require_id, require_text
from data_prep.corpora.files import COLUMNAR, FileCorpus
from data_prep.corpora.parquet import column_names
from data_prep.corpora.tables import Concatenated
from data_prep.example import Example, Role
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
MEDIA_PARTS = ("video", "video_url", "audio", "audio_url", "input_audio")


class Chat(FileCorpus):
    """A row is a conversation: a list of messages with a role and a content, and its images.

    A content is text, in which ``<image>`` marks the place of an image, or a list of ``{type: text, text}`` and
    ``{type: image}`` parts. An image is a file name, or bytes as Hugging Face ``datasets`` writes them
    (``{bytes, path}``). Images come from a column of the row, in order, or from the parts themselves (``image``,
    ``path``, ``url`` or ``image_url``). The usual column and key names are detected; name any others by an option.
    A row with video or audio is rejected (``unsupported-media``).
    """

    messages_column: str | None = None
    """Column of the messages; default: the first of ``messages``, ``conversations``, ``conversation`` that exists."""
    images_column: str | None = None
    """Column of the image or the list of images; default: ``images`` or ``image``, if the file has one."""
    id_column: str | None = None
    """Column of the ids; default: the row number is the id."""
    role_key: str | None = None
    """Key of a message's role; default: ``role`` or ``from``."""
    content_key: str | None = None
    """Key of a message's content; default: ``content`` or ``value``."""
    roles: dict[str, Role] = Field(default=ROLES)
    """Role names in the files -> ``system``, ``user`` or ``assistant``. A row with any other role is rejected."""
    images: RawFolder = Path()
    """Folder of the images that rows give by file name."""
    unmarked: Unmarked = "reject"
    """What to do with a row of several images and no ``<image>`` marker: ``reject`` it, or put the images ``first`` (as
    VLM-R1 data expects). A single image without a marker always comes first."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; a conversation is parsed when it is needed."""
        return Concatenated([self.table(path, self._columns(path)) for path in self.files()])

    def rows_with_ids(self) -> Iterable[object]:
        """Return only the id column: reading all images to compare ids would take hours."""
        return Concatenated([self.table(path, [self.id_column]) for path in self.files()]) if self.id_column else ()

    @property
    def _messages(self) -> tuple[str, ...]:
        return (self.messages_column,) if self.messages_column else MESSAGES

    @property
    def _images(self) -> tuple[str, ...]:
        return (self.images_column,) if self.images_column else IMAGES

    def _columns(self, path: Path) -> list[str]:
        """Return the columns to read of a columnar file: the first that it has of each group, and media to reject."""
        if path.suffix not in COLUMNAR:
            return []
        known = column_names(path)
        columns = [self.id_column] if self.id_column else []
        for names in (self._messages, self._images):
            if names == IMAGES and not set(names) & set(known):
                continue  # a text-only dataset
            columns.append(next((name for name in names if name in known), names[0]))
        return [*columns, *(name for name in MEDIA_KEYS if name in known and name not in columns)]

    def row_id(self, row: Row) -> str:
        """Return the id, if ``id_column`` is set."""
        return require_id(row, self.id_column) if self.id_column else ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        refuse_media(row)
        inline = list[object]()
        messages = [self._message(as_row(raw), inline) for raw in require(row, _key(row, self._messages), list)]
        check_order(messages)
        column = row.get(_key(row, self._images))
        listed = column if isinstance(column, list) else [] if column is None else [column]
        folder = self.root / self.images
        images = [image_of(value, f"{sample}/{number}", folder) for number, value in enumerate(inline or listed)]
        yield Example(sample, insert_images(messages, images, self.unmarked))

    def _message(self, message: Row, inline: list[object]) -> Message:
        """Return a message as text with markers; images given in its parts are appended to ``inline``."""
        refuse_media(message)
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
        return Message(role, require_text(message, key, empty="no-answer" if role == "assistant" else "empty-text"))


def _key(row: Row, names: Sequence[str]) -> str:
    """Return the first key with a value in the row, or else the first key, so that an error names it."""
    return next((name for name in names if row.get(name) not in (None, [])), names[0])


def _part(part: Row, inline: list[object]) -> str:
    """Return a content part as text, or as a marker; an image given in the part is appended to ``inline``."""
    kind = require(part, "type", str)
    if kind == "text":
        return clean_text(require(part, "text", str), "text")
    if kind in MEDIA_PARTS:
        raise BadSample("unsupported-media", f"a part is of type {kind!r}, but video and audio are not supported")
    if kind not in IMAGE_PARTS:
        raise BadSample("bad-label", f"a part is of type {kind!r}, expected text or image")
    given = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(given, Mapping) and "url" in given:
        given = given["url"]
    if given is not None:
        inline.append(given.removeprefix("file://") if isinstance(given, str) else given)
    return MARKER
