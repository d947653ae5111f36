"""Conversations with ``<image>`` markers in their text, as LLaVA introduced them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from data_prep.corpora.base import Row
from data_prep.example import ImageRef, Part, Role, Turn
from data_prep.quarantine import BadSample

MARKER = "<image>"
MISPLACED = "an image in an assistant or system turn; only user turns may hold images"
MEDIA_KEYS = ("video", "videos", "audio", "audios")
"""Keys of rows and messages under which LLaMA-Factory, ms-swift and LLaVA-Video put what is not supported."""
Unmarked: TypeAlias = Literal["reject", "first"]


class Message(NamedTuple):
    """A turn whose text still holds its image markers."""

    role: Role
    text: str


def refuse_media(row: Row) -> None:
    """Raise BadSample (unsupported-media) when a row or message has video or audio: its text alone makes no sense."""
    for key in MEDIA_KEYS:
        if row.get(key) not in (None, "", [], {}):
            raise BadSample("unsupported-media", f"'{key}' is set, but video and audio are not supported")


def check_order(messages: Sequence[Message]) -> None:
    """Check that a conversation alternates user, assistant, user, ... and ends with the assistant.

    Raises:
        BadSample: no-answer when the last turn is not the assistant's; bad-label when the roles do not alternate.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns or turns[-1].role != "assistant":
        raise BadSample("no-answer", "the conversation does not end with an answer")
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise BadSample("bad-label", f"turn {number + 1} is by the {turn.role}; user and assistant must alternate")


def insert_images(
    messages: Sequence[Message], images: Sequence[ImageRef], unmarked: Unmarked = "reject"
) -> tuple[Turn, ...]:
    """Replace the markers in user turns by the images; without markers, put the images before the first user turn.

    A marker in any other turn is kept as text when the user turns hold the markers of the images.

    Args:
        messages: turns with their markers.
        images: in order of their markers.
        unmarked: what to do about several images without any marker; a single one always comes first.

    Raises:
        BadSample: missing-image when the numbers of markers and images differ; bad-label when only assistant or
            system turns hold markers.
    """
    marks = sum(turn.text.count(MARKER) for turn in messages if turn.role == "user")
    if images and not marks and any(MARKER in turn.text for turn in messages):
        raise BadSample("bad-label", MISPLACED)
    if marks == 0 and len(images) > 1 and unmarked == "reject":
        raise BadSample(
            "missing-image", f"{len(images)} images but no {MARKER} marker; unmarked: first puts them first"
        )
    if marks not in (0, len(images)):
        raise BadSample("missing-image", f"{marks} {MARKER} markers for {len(images)} images")
    opening: tuple[Part, ...] = tuple(images) if marks == 0 else ()
    waiting = iter(images)
    turns = []
    for turn in messages:
        if turn.role != "user":
            turns.append(Turn(turn.role, (turn.text,)))
            continue
        parts = _split(turn.text, waiting) if marks else (turn.text,)
        turns.append(Turn("user", (*opening, *parts)))
        opening = ()
    return tuple(turns)


def _split(content: str, waiting: Iterator[ImageRef]) -> tuple[Part, ...]:
    """Replace each marker by the next image, and strip the white space around the turn's text.

    White space between two texts stays, so an image in mid-sentence does not glue words together.
    """
    pieces = content.split(MARKER)
    filled = [number for number, piece in enumerate(pieces) if piece.strip()]
    parts = list[Part]()
    for number, piece in enumerate(pieces):
        if number:
            parts.append(next(waiting))
        if number in filled:
            opened = piece.lstrip() if number == filled[0] else piece
            parts.append(opened.rstrip() if number == filled[-1] else opened)
    return tuple(parts)
