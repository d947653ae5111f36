"""The draws of a pack set in blended order, a chunk at a time.

A plan of 100 million draws must fit a small node, so memory does not grow with the draws: it holds, for each distinct
sample, its length, its images and its place in the current epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.ingest.prompts import PromptDraws, prompt_ids
from data_prep.ingest.samples import read_stats
from data_prep.ingest.workspace import ShardOutput
from data_prep.planning.audit import CorpusAudit, audit_samples, check_audit
from data_prep.planning.packing import (
    CHUNK_DRAWS,
    Counts,
    Ints,
    Numbers,
    epoch_order,
    exact_draws,
    interleave,
    sample_order,
    token_slots,
)
from data_prep.recipe import PackConfig
from data_prep.text.tokenizer import Tokenizer

_NONE: Numbers = np.empty(0, dtype=np.uint32)
Outputs = Sequence[tuple[ShardOutput, int]]
"""Shard outputs of a corpus, and their numbers of samples."""


@dataclass(frozen=True, slots=True)
class DrawChunk:
    """Consecutive draws; arrays of equal length."""

    corpus: npt.NDArray[np.int16]
    shard: npt.NDArray[np.int32]
    index: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int16]
    tokens: npt.NDArray[np.int32]
    """Including the prompt."""
    images: npt.NDArray[np.int32]
    """Images, or their tokens where the pack set limits those."""

    @property
    def planned(self) -> dict[str, npt.NDArray[Any]]:
        """The columns that a plan file holds."""
        return {name: getattr(self, name) for name in ("corpus", "shard", "index", "prompt")}

    @classmethod
    def joined(cls, chunks: Sequence[DrawChunk]) -> DrawChunk:
        """Return several chunks as one."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names))

    def part(self, start: int, stop: int) -> DrawChunk:
        """Return the draws ``start .. stop - 1``."""
        return DrawChunk(*(getattr(self, field.name)[start:stop] for field in fields(self)))


class _CorpusDraws:
    """The draws of one corpus, in order."""

    def __init__(self, corpus: str, outputs: Outputs, count: int, pack: PackConfig, seed: int) -> None:
        """Read the stats of all samples; one shard output is open at a time.

        Args:
            corpus: its name.
            outputs: its shard outputs.
            count: number of draws.
            pack: whose ``seq_len`` bounds every sample.
            seed: of the recipe.

        Raises:
            UserError: a shard output is damaged.
        """
        self.count, self.outputs = count, len(outputs)
        self._starts = np.cumsum([0, *(kept for _, kept in outputs)])
        samples = int(self._starts[-1])
        self._epochs = sample_order(samples, count, seed, corpus) if pack.shuffle else _in_order(samples, count)
        self._left: Numbers = _NONE
        narrow = np.min_scalar_type(pack.seq_len)
        self._tokens, self._images = np.empty(samples, dtype=narrow), np.empty(samples, dtype=narrow)
        self._prompted = np.empty(samples, dtype=np.bool_)
        self._counted = "images" if pack.max_image_tokens is None else "image_tokens"
        self.audit = self._read(outputs, _times(corpus, samples, count, pack, seed)) if count else _nothing(samples)
        self._prompts = PromptDraws(len(pack.prompts), seed, corpus)

    def _read(self, outputs: Outputs, times: tuple[int, npt.NDArray[np.bool_] | None]) -> CorpusAudit:
        """Fill the facts of every sample; return the audit of the draws, prompts excluded."""
        whole, last = times
        samples, audit = len(self._tokens), _nothing(len(self._tokens))
        for (output, kept), (start, stop) in zip(outputs, itertools.pairwise(self._starts.tolist()), strict=True):
            stats = read_stats(output, kept)
            self._tokens[start:stop], self._images[start:stop] = stats["tokens"], stats[self._counted]
            self._prompted[start:stop] = stats["prompted"]
            drawn = whole if last is None else whole + last[start:stop].astype(np.int64)
            audit += audit_samples(stats, drawn, samples)
        return audit

    def take(self, count: int, prompt_tokens: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
        """Return shard (of this corpus), index, prompt, tokens and images of the next draws.

        Args:
            count: of the draws.
            prompt_tokens: length of each prompt and, last, 0 for no prompt.
        """
        numbers = self._next(count)
        shard = np.searchsorted(self._starts, numbers, side="right") - 1
        prompt = self._prompts.take(self._prompted[numbers])
        added = prompt_tokens[prompt]
        self.audit = replace(self.audit, tokens=self.audit.tokens + int(added.sum()))
        return {
            "shard": shard.astype(np.int32), "index": (numbers - self._starts[shard]).astype(np.int32),
            "prompt": prompt, "tokens": (self._tokens[numbers] + added).astype(np.int32),
            "images": self._images[numbers].astype(np.int32),
        }  # fmt: skip

    def _next(self, count: int) -> Ints:
        parts = [self._cut(count)]
        while missing := count - sum(map(len, parts)):
            self._left = _NONE  # frees the last epoch before the next one is drawn
            self._left = next(self._epochs)
            parts.append(self._cut(missing))
        return np.concatenate(parts)

    def _cut(self, count: int) -> Ints:
        """Take up to so many numbers of the current epoch, copied: a view would keep all of it."""
        part = self._left[:count].astype(np.int64)
        self._left = self._left[count:]
        return part


def _times(
    corpus: str, samples: int, count: int, pack: PackConfig, seed: int
) -> tuple[int, npt.NDArray[np.bool_] | None]:
    """Return how often every sample is drawn, and which ones once more; None for none."""
    whole, rest = divmod(count, samples)
    if not rest:
        return whole, None
    last = np.zeros(samples, dtype=np.bool_)
    last[epoch_order(samples, count, seed, corpus, whole) if pack.shuffle else slice(rest)] = True
    return whole, last


def _nothing(samples: int) -> CorpusAudit:
    return CorpusAudit(0, samples, 0, 0, 0, 0, 0, 0, 0)


def _in_order(samples: int, draws: int) -> Iterator[Numbers]:
    """Yield the sample numbers of unshuffled epochs."""
    for start in range(0, draws, max(1, samples)):
        yield np.arange(min(samples, draws - start))


class BlendedDraws:
    """All draws of a pack set, read once."""

    def __init__(self, corpora: Mapping[str, _CorpusDraws], pack: PackConfig, prompt_tokens: Sequence[int]) -> None:
        """Blend corpora; ``prompt_tokens``: length of each prompt."""
        self._corpora, self._shuffle = corpora, pack.shuffle
        self._prompt_tokens = np.array([*prompt_tokens, 0], dtype=np.int32)  # the last entry is for NO_PROMPT

    def __len__(self) -> int:
        return sum(corpus.count for corpus in self._corpora.values())

    @property
    def audits(self) -> dict[str, CorpusAudit]:
        """The audit of every corpus; tokens of prompts count once they are drawn."""
        return {name: corpus.audit for name, corpus in self._corpora.items()}

    def chunks(self, multiple: int) -> Iterator[DrawChunk]:
        """Yield the draws in order; every chunk but the last holds a multiple of so many."""
        waiting = list[DrawChunk]()
        for corpus in self._order():
            joined = DrawChunk.joined([*waiting, self._drawn(corpus)])
            whole = len(joined.corpus) // multiple * multiple
            if whole:
                yield joined.part(0, whole)
            waiting = [joined.part(whole, len(joined.corpus))]
        if waiting and len(waiting[0].corpus):
            yield waiting[0]

    def _order(self) -> Iterator[npt.NDArray[np.int16]]:
        """Yield the corpus of every draw; without shuffling, corpus after corpus."""
        counts = [corpus.count for corpus in self._corpora.values()]
        if self._shuffle:
            yield from interleave(counts)
            return
        for number, count in enumerate(counts):
            for start in range(0, count, CHUNK_DRAWS):
                yield np.full(min(CHUNK_DRAWS, count - start), number, dtype=np.int16)

    def _drawn(self, corpus: npt.NDArray[np.int16]) -> DrawChunk:
        """Return the next draws of these corpora."""
        places = np.argsort(corpus, kind="stable")  # draws of the first corpus, then of the second, ...
        counts = np.bincount(corpus, minlength=len(self._corpora)).tolist()
        first, parts = 0, []
        for own, count in zip(self._corpora.values(), counts, strict=True):
            part = own.take(count, self._prompt_tokens)
            part["shard"] += np.int32(first)
            parts.append(part)
            first += own.outputs
        return DrawChunk(corpus, **{name: _spread([part[name] for part in parts], places) for name in parts[0]})


def _spread(parts: Sequence[npt.NDArray[Any]], places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    joined = np.concatenate(parts)
    blended = np.empty_like(joined)
    blended[places] = joined
    return blended


def open_draws(
    name: str, pack: PackConfig, seed: int, outputs: Mapping[str, Outputs], prompt_tokens: Sequence[int]
) -> BlendedDraws:
    """Return the draws of a pack set.

    Args:
        name: of the pack set, for messages.
        pack: its recipe.
        seed: of the recipe.
        outputs: of every corpus.
        prompt_tokens: length of each prompt.

    Raises:
        UserError: the audit fails, or a shard output is damaged.
    """
    if pack.draws is None:
        counts = [sum(kept for _, kept in own) * (pack.epochs or 1) for own in outputs.values()]
    else:
        counts = exact_draws([pack.corpora[corpus] for corpus in outputs], pack.draws)
    corpora = {
        corpus: _CorpusDraws(corpus, own, count, pack, seed)
        for (corpus, own), count in zip(outputs.items(), counts, strict=True)
    }
    check_audit(name, {corpus: own.audit for corpus, own in corpora.items()})
    return BlendedDraws(corpora, pack, prompt_tokens)


def image_needs(pack: PackConfig, images: npt.NDArray[np.int32]) -> Counts:
    """Return what the images of draws take of a row's room for images; ``images``: as `DrawChunk` has them."""
    return images if pack.max_image_tokens is None else token_slots(images, pack.max_image_tokens)[0]


def image_slots(pack: PackConfig) -> int | None:
    """Return a row's room for images; None for no limit."""
    if pack.max_image_tokens is None:
        return pack.max_images
    return token_slots(np.empty(0, dtype=np.int32), pack.max_image_tokens)[1]


def prompt_lengths(tokenizer: Tokenizer, pack: PackConfig) -> list[int]:
    """Return the number of tokens of each prompt of a pack set."""
    return [len(ids) for ids in prompt_ids(tokenizer, pack.prompts)]
