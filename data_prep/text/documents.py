"""Interleaved documents: images and text in turn, longer than a row as often as not.

A document is a list of units, each the images before a text and that text. It is cut between units only: an image is
never parted from the text behind it, nor a text in the middle. What a cut leaves open gets no end token, because the
document goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from data_prep.example import Example, ImageRef, Turn

_PARAGRAPHS = "\n\n"  # between texts that meet where an image is left out


@dataclass(frozen=True, slots=True)
class Room:
    """What one sample may hold."""

    tokens: int
    """With its images."""
    text_tokens: int | None
    images: int | None


@dataclass(frozen=True, slots=True)
class Size:
    """What a part of a document takes."""

    tokens: int
    images: int
    image_tokens: int
    """Of each image."""

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.images + other.images, self.image_tokens)

    def fits(self, room: Room) -> bool:
        """Return whether there is room for it and an end token."""
        text = self.tokens - self.images * self.image_tokens
        return (
            self.tokens < room.tokens
            and (room.text_tokens is None or text < room.text_tokens)
            and (room.images is None or self.images <= room.images)
        )


def units(document: Example) -> list[Example]:
    """Return the units of a document as documents that go on: each ends with a text."""
    found, turns = [], list[Turn]()
    for turn in document.turns:
        turns.append(turn)
        if turn.role == "assistant":
            found.append(replace(document, turns=tuple(turns), continues=True))
            turns = []
    return found


def fitting(document: Example, room: Room, measure: Callable[[Example], Size]) -> Iterator[Example]:
    """Yield a document, or the parts of it that fit into ``room``, with ids ``ID#1``, ``ID#2``, ...

    A unit that is too large by itself is a part of its own, to be cut or rejected as any other sample. ``measure``
    must be additive over units, which it is because texts on both sides of an image are encoded apart.
    """
    whole = units(document)
    if len(whole) < 2:
        yield document
        return
    parts, sizes = list[list[Example]](), list[Size]()
    for unit in whole:
        size = measure(unit)
        if parts and (sizes[-1] + size).fits(room):
            parts[-1].append(unit)
            sizes[-1] += size
        else:
            parts.append([unit])
            sizes.append(size)
    if len(parts) < 2:
        yield document
        return
    for number, part in enumerate(parts, start=1):
        turns = tuple(turn for unit in part for turn in unit.turns)
        goes_on = number < len(parts)
        yield replace(document, id=f"{document.id}#{number}", turns=turns, continues=goes_on)


def without_images(example: Example, dropped: Collection[ImageRef]) -> Example:
    """Return an example without some of its images; texts that meet join, and what follows the last text goes."""
    turns = list[Turn]()
    for turn in example.turns:
        parts = tuple(part for part in turn.parts if isinstance(part, str) or not any(part is one for one in dropped))
        if turn.role == "assistant" and turns and turns[-1].role == "assistant":
            turns[-1] = Turn("assistant", (*turns[-1].parts, _PARAGRAPHS, *parts))
        elif parts:
            turns.append(Turn(turn.role, parts))
    return replace(example, turns=tuple(turns))
