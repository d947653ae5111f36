"""LLaVA conversations: several turns about an image, or about none, kept whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, as_row
from data_prep.corpora.fields import clean, find_image, key_text, require, text
from data_prep.corpora.tables import json_array
from data_prep.example import Example, ImageRef, Part, Role, Turn
from data_prep.quarantine import BadSample

MARKER = "<image>"
SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class Spoken(NamedTuple):
    """A turn before its image markers are looked at."""

    role: Role
    text: str


class LLaVA(RowCorpus):
    """``[{id, image, conversations: [{from: human|gpt, value}]}]``; the whole conversation is one example.

    ``<image>`` may stand anywhere in the human turns; a conversation with an image and no marker opens with it.
    An id may repeat (the published file joins three sets): ids get a hash of the conversation, and only an id that
    repeats with the same conversation is a duplicate.
    """

    conversations: RawFile = Path("llava_instruct_150k.json")
    """The list of conversations."""
    images: RawFolder = Path("train2017")
    """Folder of the images."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; conversations are read when needed."""
        return json_array(self.root / self.conversations)

    def row_id(self, row: Row) -> str:
        """Return the id and a hash of what is said."""
        said = json.dumps([row.get("image"), row.get("conversations")])
        return f"{key_text(row, 'id')}-{xxhash.xxh32_hexdigest(said.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        spoken = [_spoken(as_row(turn)) for turn in require(row, "conversations", list)]
        check_order(spoken)
        image = find_image(self.root / self.images, require(row, "image", str)) if row.get("image") else None
        yield Example(sample, insert_images(spoken, [image] if image else []))


def _spoken(turn: Row) -> Spoken:
    speaker = require(turn, "from", str)
    if speaker not in SPEAKERS:
        raise BadSample("bad-label", f"'from' is {speaker!r}, expected human or gpt")
    role = SPEAKERS[speaker]
    return Spoken(role, text(turn, "value", empty="no-answer" if role == "assistant" else "empty-text"))


def check_order(spoken: Sequence[Spoken]) -> None:
    """Refuse conversations that do not alternate user, assistant, user, ... up to an answer.

    Raises:
        BadSample: no-answer where the last word is the user's; bad-label where somebody speaks out of turn.
    """
    turns = spoken[1:] if spoken and spoken[0].role == "system" else spoken
    if not turns or turns[-1].role != "assistant":
        raise BadSample("no-answer", "the conversation does not end with an answer")
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise BadSample("bad-label", f"turn {number + 1} is by the {turn.role}: speakers must alternate")


def insert_images(spoken: Sequence[Spoken], images: Sequence[ImageRef]) -> tuple[Turn, ...]:
    """Put the images where the markers of the user's turns stand, or first of all where there is no marker.

    Raises:
        BadSample: missing-image where markers and images differ in number.
    """
    marks = sum(turn.text.count(MARKER) for turn in spoken if turn.role == "user")
    if marks not in (0, len(images)) or (marks == 0 and len(images) > 1):
        raise BadSample("missing-image", f"{marks} {MARKER} markers for {len(images)} images")
    opening: tuple[Part, ...] = tuple(images) if marks == 0 else ()
    waiting = iter(images)
    turns = []
    for turn in spoken:
        if turn.role != "user":
            turns.append(Turn(turn.role, (turn.text,)))
            continue
        parts = _split(turn.text, waiting) if marks else (turn.text,)
        turns.append(Turn("user", (*opening, *parts)))
        opening = ()
    return tuple(turns)


def _split(said: str, waiting: Iterable[ImageRef]) -> tuple[Part, ...]:
    """Replace each marker by the next image; white space around a marker belongs to the marker."""
    source, parts = iter(waiting), list[Part]()
    for number, piece in enumerate(said.split(MARKER)):
        if number:
            parts.append(next(source))
        if clean(piece, "value"):
            parts.append(piece.strip())
    return tuple(parts)
