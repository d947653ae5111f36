"""What every corpus reader yields: one conversation with its images, before any template or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of an example: either the encoded bytes at hand, or a file that is read when needed."""

    name: str
    """Where it came from, for messages: a file name, or ``shard.tar/KEY.jpg``."""
    path: Path | None = None
    """The file; beside ``data``, the archive that holds it as the member ``name``."""
    data: bytes | None = None
    optional: bool = False
    """Where it cannot be used, it is left out and counted, and its sample is kept."""
    annotated_size: tuple[float, float] | None = None
    """Width and height that boxes refer to; ingest rejects the sample when the upright image has another shape."""

    def read(self) -> bytes:
        """Return the encoded bytes. Raises OSError when the file cannot be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None, f"image {self.name} has neither bytes nor a path"
        return self.path.read_bytes()


Part: TypeAlias = str | ImageRef


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's words: text and images in reading order."""

    role: Role
    parts: tuple[Part, ...]
    """Plain text (never special tokens: text that spells one is neutralised by the tokenizer step) and images."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation sample: a caption, a question with its answer, or a whole conversation.

    Assistant turns are *generated* (supervised); everything else is *given*.
    """

    id: str
    """Unique within its corpus; the ``sample`` of the pack's ``source`` column."""
    turns: tuple[Turn, ...]
    kind: Literal["chat", "document"] = "chat"
    """``chat`` goes through the chat template; ``document`` (captions) is written without role headers."""
    family: str = ""
    """Question family for accuracy tables (VQAv2 ``question_type``, ...); empty when the corpus has none."""
    continues: bool = False
    """A document that goes on in another sample: it gets no end token."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Anything worth showing in ``inspect``; never read by training."""

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order; their positions are the sidecar's instance ids."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef))


@dataclass(frozen=True, slots=True)
class Reject:
    """A raw sample that cannot be used: why, in a code that is counted and words that help to mend it."""

    sample: str
    code: str
    """Lower-case with dashes, e.g. ``missing-image``; the closed list is ``data_prep.quarantine.CODES``."""
    detail: str = ""
    raw: str = ""
    """What was found, as far as it is text."""
    image: ImageRef | None = None
    """Its image, where there is one."""
    sought: Path | None = None
    """A file it lacks: when that comes, it is read again."""
