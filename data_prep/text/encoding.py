"""Encodes template pieces as token ids with sidecars: the rules that keep markers out of ordinary text.

Special tokens come only from ``Special`` pieces. Text that spells one (``<image>``, ``<|assistant|>``) is encoded as
ordinary text, so no caption can start a turn or claim an image.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_prep.common.errors import UserError
from data_prep.common.modalities import IMAGE, TEXT
from data_prep.text.template import Image, Piece, Special, Text

Ids: TypeAlias = npt.NDArray[np.int32]
_NO_IDS = np.empty(0, dtype=np.int32)
_SHORT_CHARACTERS = 256
_SHORT_TEXTS, _LONG_TEXTS = 1 << 14, 1 << 8
"""Cached encodings. Short texts (system prompts, role names, answers) repeat all the time; long ones repeat only within
a document or conversation, and thousands of them would fill memory."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one sample with their sidecars; arrays of one length."""

    ids: Ids
    modality: npt.NDArray[np.int8]
    instance: npt.NDArray[np.int16]
    """Image index at image positions, -1 at text."""
    generated: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Encoded:
        """Return the first ``length`` tokens."""
        return Encoded(self.ids[:length], self.modality[:length], self.instance[:length], self.generated[:length])


@dataclass(frozen=True)
class Markers:
    """The special tokens of a tokenizer; JSON-ready."""

    tokens: Mapping[str, int]
    """Name in templates -> id."""
    reserved: Mapping[int, str]
    """Id -> name of every token that ordinary text must never encode to; those of ``tokens`` are among them."""
    image_id: int
    size: int
    """Number of ids."""
    stripping: tuple[str, ...] = ()
    """Names in templates of tokens after which white space is dropped (as Phi-3 does)."""


class PieceEncoder:
    """Encodes pieces with a function that encodes ordinary text without adding any special token."""

    def __init__(self, encode_text: Callable[[str], Ids], markers: Markers) -> None:
        """Wrap ``encode_text``; it may produce reserved ids, which are then removed or avoided here."""
        self.markers = markers
        self._encode_text = encode_text
        self._spelled = re.compile("|".join(re.escape(name) for name in sorted(set(markers.reserved.values()))))
        self._is_reserved = np.zeros(max(markers.size, *markers.reserved) + 1, dtype=bool)
        self._is_reserved[list(markers.reserved)] = True
        self._mark = functools.cache(lambda token: np.array([self.id_of(token)], dtype=np.int32))
        self._short = functools.lru_cache(_SHORT_TEXTS)(self._encode_ordinary)
        self._long = functools.lru_cache(_LONG_TEXTS)(self._encode_ordinary)

    def id_of(self, token: str) -> int:
        """Return the id of a special token by its name in templates. Raises UserError if it was never added."""
        if token not in self.markers.tokens:
            raise UserError(f"the tokenizer has no special token {token!r}: prepare the packs with a template using it")
        return self.markers.tokens[token]

    def encode(self, pieces: Iterable[Piece], image_tokens: int | Sequence[int]) -> Encoded:
        """Return ids and sidecars of pieces; ``image_tokens`` are the positions of every image, or of each by index.

        Neighbouring texts are encoded together, but never given text with generated text, or isolated text with any
        other: a prompt at inference has exactly the ids of the training prefix.
        """
        runs = list(self._runs(pieces, image_tokens))
        lengths = [len(run) for run, _, _ in runs]
        ids = np.concatenate([_NO_IDS, *(run for run, _, _ in runs)])
        instance = np.array([index for _, index, _ in runs], dtype=np.int16).repeat(lengths)
        generated = np.array([flag for _, _, flag in runs], dtype=np.uint8).repeat(lengths)
        modality = np.where(instance >= 0, np.int8(IMAGE), np.int8(TEXT))
        return Encoded(ids, modality, instance, generated)

    def _runs(self, pieces: Iterable[Piece], image_tokens: int | Sequence[int]) -> Iterator[tuple[Ids, int, int]]:
        """Yield (ids, image index or -1, generated flag) for runs of pieces."""
        strip = False
        for piece in _joined(pieces):
            if isinstance(piece, Special):
                yield self._mark(piece.token), -1, int(piece.generated)
            elif isinstance(piece, Image):
                tokens = image_tokens if isinstance(image_tokens, int) else image_tokens[piece.index]
                yield np.full(tokens, self.markers.image_id, dtype=np.int32), piece.index, 0
            else:
                yield self._ordinary(piece.text.lstrip() if strip else piece.text), -1, int(piece.generated)
            strip = isinstance(piece, Special) and piece.token in self.markers.stripping

    def _ordinary(self, text: str) -> Ids:
        return self._short(text) if len(text) <= _SHORT_CHARACTERS else self._long(text)

    def _encode_ordinary(self, text: str) -> Ids:
        """Encode text without producing a special token, even where the tokenizer would match one."""
        ids = self._encode_text(text)
        reserved = self._is_reserved.take(ids)
        if not np.count_nonzero(reserved):
            return ids
        if len(text) < 2:
            return ids[~reserved]
        match = self._spelled.search(text)
        # Split inside the spelled token, so neither half spells it. A normaliser may turn look-alike characters into
        # one; then repeated halving finds the place. A token of one character is isolated and dropped.
        middle = min(match.start() + 1, len(text) - 1) if match else len(text) // 2
        return np.concatenate([self._encode_ordinary(text[:middle]), self._encode_ordinary(text[middle:])])


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces, joining neighbouring texts of one kind (given, generated or isolated)."""
    last: Text | None = None
    for piece in pieces:
        text = piece if isinstance(piece, Text) else None
        if text and last and (text.generated, text.isolated) == (last.generated, last.isolated):
            last = Text(last.text + text.text, last.generated, last.isolated)
            continue
        if last:
            yield last
        if not text:
            yield piece
        last = text
    if last:
        yield last
