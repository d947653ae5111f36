"""Synthetic packed rows for the benchmarks: four mixtures of samples, drawn with a seed, as sidecars."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline.masks import Sidecars

SYSTEM, IMAGE, QUESTION, ANSWER = "SVQA"
IMAGE_TOKENS = 144
Piece = tuple[str, int]


def _vqa(rng: random.Random) -> list[Piece]:
    return [(SYSTEM, 4), (IMAGE, IMAGE_TOKENS), (QUESTION, rng.randint(20, 60)), (ANSWER, rng.randint(5, 100))]


def _chat(rng: random.Random) -> list[Piece]:
    turns = [(rng.randint(15, 50), rng.randint(40, 250)) for _ in range(rng.randint(3, 8))]
    return [(SYSTEM, 4), (IMAGE, IMAGE_TOKENS), *(piece for q, a in turns for piece in ((QUESTION, q), (ANSWER, a)))]


def _text(rng: random.Random) -> list[Piece]:
    return [(SYSTEM, 4), (QUESTION, rng.randint(20, 100)), (ANSWER, rng.randint(50, 400))]


def _mixed(rng: random.Random) -> list[Piece]:
    draw = rng.random()
    return _vqa(rng) if draw < 0.6 else _chat(rng) if draw < 0.85 else _text(rng)


def _interleaved(rng: random.Random) -> list[Piece]:
    shown = [((IMAGE, IMAGE_TOKENS), (QUESTION, rng.randint(5, 30))) for _ in range(rng.randint(1, 3))]
    tail = [(QUESTION, rng.randint(20, 60)), (ANSWER, rng.randint(5, 100))]
    return [(SYSTEM, 4), *(piece for pair in shown for piece in pair), *tail]


KINDS: Mapping[str, Callable[[random.Random], list[Piece]]] = {
    "short VQA": _vqa,
    "mixed": _mixed,
    "chats": _chat,
    "interleaved": _interleaved,
}


def make_row(kind: str, tokens: int, seed: int = 0) -> Sidecars:
    """Pack samples of a kind into one row of exactly ``tokens`` tokens; the rest is padding."""
    columns: list[tuple[int, int, int, int]] = []
    images = 0
    for segment, pieces in enumerate(_samples(kind, random.Random(seed)), start=1):
        if len(columns) + sum(seq_len for _, seq_len in pieces) > tokens:
            break
        for code, seq_len in pieces:
            medium = code == IMAGE
            columns += [(segment, int(medium), images if medium else -1, int(code == ANSWER))] * seq_len
            images += medium
    columns += [(0, 0, -1, 0)] * (tokens - len(columns))
    segment, modality, instance, generated = torch.tensor(columns).T
    return Sidecars(segment, modality, instance, generated)


def _samples(kind: str, rng: random.Random) -> Iterator[list[Piece]]:
    while True:
        yield KINDS[kind](rng)
