"""What every corpus reader yields: one sample with its images, before any template or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from data_prep.common.files import read_bounded

Role: TypeAlias = Literal["system", "user", "assistant"]
MAX_IMAGE_BYTES = 1 << 27
"""Largest encoded image, 128 MiB."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of an example: its encoded bytes, or a file to read when they are needed."""

    name: str
    """Origin, for messages: a file name, or ``shard.tar/KEY.jpg``."""
    path: Path | None = None
    """The image file; when ``data`` is set, the archive that holds the image as member ``name``."""
    data: bytes | None = None
    """Encoded bytes, or None to read them from ``path``."""
    optional: bool = False
    """When unusable, the image is dropped and counted, and its sample is kept."""
    annotated_size: tuple[float, float] | None = None
    """Width and height that boxes refer to; ingest rejects the sample when the upright image has another shape."""

    def read(self) -> bytes:
        """Return the encoded bytes. Raises OSError when the file cannot be read or exceeds ``MAX_IMAGE_BYTES``."""
        if self.data is not None:
            return self.data
        assert self.path is not None, f"image {self.name} has neither bytes nor a path"
        return read_bounded(self.path, MAX_IMAGE_BYTES)


Part: TypeAlias = str | ImageRef


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: text and images in reading order."""

    role: Role
    parts: tuple[Part, ...]
    """Plain text and images. Text never yields special tokens, whatever it spells."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation sample: a caption, a question with its answer, or a whole conversation.

    Assistant turns are *generated* (supervised); everything else is *given*.
    """

    id: str
    """Unique within its corpus; the ``sample`` in the packs' ``source`` column."""
    turns: tuple[Turn, ...]
    kind: Literal["chat", "document"] = "chat"
    """``chat`` uses the chat template; ``document`` (captions) has no role headers."""
    family: str = ""
    """Question family for accuracy tables (VQAv2 ``question_type``, ...); empty when the corpus has none."""
    continues: bool = False
    """Whether a document continues in another sample; it then gets no end token."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Additional facts for ``inspect``; never used by training."""

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order; their positions are the sidecar's instance ids."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef))


@dataclass(frozen=True, slots=True)
class Reject:
    """A raw sample that cannot be used: a reason code that is counted, and a detail that helps to fix it."""

    sample: str
    code: str
    """Lower-case with dashes, e.g. ``missing-image``; the closed list is ``data_prep.quarantine.CODES``."""
    detail: str = ""
    raw: str = ""
    """The raw sample as text."""
    image: ImageRef | None = None
    """Its first image, if any."""
    missing_file: Path | None = None
    """The file it lacks; once the file exists, the shard is ingested again."""
