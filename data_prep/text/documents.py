"""Interleaved documents of images and text, often longer than a row.

A document is a list of blocks: some images and the text after them. It is split only between blocks, so an image always
stays with its text and no text is split. A part that is not the last gets no end token, because the document continues.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from data_prep.example import Example, ImageRef, Turn

_PARAGRAPHS = "\n\n"  # between texts that become neighbours when an image is dropped


@dataclass(frozen=True, slots=True)
class Limits:
    """Size limits of one sample."""

    tokens: int
    """Including image tokens."""
    text_tokens: int | None
    images: int | None
    image_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a part of a document."""

    tokens: int
    images: int
    image_tokens: int
    """Tokens of all its images."""

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.images + other.images, self.image_tokens + other.image_tokens)

    def fits(self, limits: Limits) -> bool:
        """Return whether it fits together with an end token."""
        text = self.tokens - self.image_tokens
        return (
            self.tokens < limits.tokens
            and (limits.text_tokens is None or text < limits.text_tokens)
            and (limits.images is None or self.images <= limits.images)
            and (limits.image_tokens is None or self.image_tokens <= limits.image_tokens)
        )


def blocks(document: Example) -> list[Example]:
    """Return the blocks of a document as documents that continue; each ends with a text."""
    found, turns = [], list[Turn]()
    for turn in document.turns:
        turns.append(turn)
        if turn.role == "assistant":
            found.append(replace(document, turns=tuple(turns), continues=True))
            turns = []
    return found


def split_to_fit(document: Example, limits: Limits, measure: Callable[[Example], Size]) -> Iterator[Example]:
    """Yield the document, or parts of it that fit into ``limits``, with ids ``ID#1``, ``ID#2``, ...

    A block that exceeds the limits becomes its own part, to be truncated or rejected like any other sample. ``measure``
    must be additive over blocks; it is, because the texts before and after an image are encoded separately.
    """
    whole = blocks(document)
    if len(whole) < 2:
        yield document
        return
    parts, sizes = list[list[Example]](), list[Size]()
    for block in whole:
        size = measure(block)
        if parts and (sizes[-1] + size).fits(limits):
            parts[-1].append(block)
            sizes[-1] += size
        else:
            parts.append([block])
            sizes.append(size)
    if len(parts) < 2:
        yield document
        return
    for number, part in enumerate(parts, start=1):
        turns = tuple(turn for block in part for turn in block.turns)
        continues = number < len(parts)
        yield replace(document, id=f"{document.id}#{number}", turns=turns, continues=continues)


def without_images(example: Example, dropped: Collection[ImageRef]) -> Example:
    """Return an example without some images; texts that become neighbours are joined, trailing images dropped."""
    turns = list[Turn]()
    for turn in example.turns:
        parts = tuple(part for part in turn.parts if isinstance(part, str) or not any(part is one for one in dropped))
        if turn.role == "assistant" and turns and turns[-1].role == "assistant":
            turns[-1] = Turn("assistant", (*turns[-1].parts, _PARAGRAPHS, *parts))
        elif parts:
            turns.append(Turn(turn.role, parts))
    return replace(example, turns=tuple(turns))
