"""Conversations with image markers in their text, as LLaVA introduced them and most chat files write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_prep.example import ImageRef, Part, Role, Turn
from data_prep.quarantine import BadSample

MARKER = "<image>"
MISPLACED = "an image in an assistant's or system's turn"
"""Detail of a bad-label: only users show images."""


class Spoken(NamedTuple):
    """A turn before its image markers are looked at."""

    role: Role
    text: str


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

    A marker in another's turn is the word that it spells, where the user's turns tell the places of the images.

    Raises:
        BadSample: missing-image where markers and images differ in number; bad-label where others alone hold markers.
    """
    marks = sum(turn.text.count(MARKER) for turn in spoken if turn.role == "user")
    if images and not marks and any(MARKER in turn.text for turn in spoken):
        raise BadSample("bad-label", MISPLACED)
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


def _split(said: str, waiting: Iterator[ImageRef]) -> tuple[Part, ...]:
    """Replace each marker by the next image; white space at the ends of the turn's text belongs to the markers there.

    Between two texts it stays: an image in the middle of a sentence must not glue its words together.
    """
    pieces = said.split(MARKER)
    filled = [number for number, piece in enumerate(pieces) if piece.strip()]
    parts = list[Part]()
    for number, piece in enumerate(pieces):
        if number:
            parts.append(next(waiting))
        if number in filled:
            opened = piece.lstrip() if number == filled[0] else piece
            parts.append(opened.rstrip() if number == filled[-1] else opened)
    return tuple(parts)
