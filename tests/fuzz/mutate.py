"""Seeded mutations of bytes: flips, cuts, splices, repeats, numbers and dictionary tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

MAX_BYTES = 1 << 18
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
Mutation = Callable[[bytearray, random.Random], None]


def mutated(corpus: Sequence[bytes], dictionary: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one input of the corpus with one to eight mutations, now and then spliced with another input."""
    data = bytearray(rng.choice(corpus))
    if rng.random() < 0.15:
        other = rng.choice(corpus)
        data[rng.randint(0, len(data)) :] = other[rng.randint(0, len(other)) :]
    for _ in range(1 << rng.randint(0, 3)):
        if dictionary and rng.random() < 0.25:
            _insert(data, rng.choice(dictionary), rng)
        else:
            rng.choice(_MUTATIONS)(data, rng)
    return bytes(data[:MAX_BYTES])


def _insert(data: bytearray, token: bytes, rng: random.Random) -> None:
    at = rng.randint(0, len(data))
    data[at : at + rng.choice((0, len(token)))] = token


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randint(0, len(data)), rng.choice((1, 2, 4, 8, 64))
    data[at : at + size] = rng.randbytes(size)


def _number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(_NUMBERS) + rng.randint(-1, 1)) % (1 << 8 * size)
    at = rng.randint(0, len(data))
    data[at : at + size] = value.to_bytes(size, rng.choice(("big", "little")))


def _cut(data: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(data))
    del data[at : at + rng.choice((1, 2, 16, 512, len(data)))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randint(0, len(data)), rng.choice((1, 4, 32, 512))
    data[at:at] = data[at : at + size] * rng.choice((1, 1, 2, 200))


def _move(data: bytearray, rng: random.Random) -> None:
    source, at, size = rng.randint(0, len(data)), rng.randint(0, len(data)), rng.choice((1, 8, 64, 512))
    data[at : at + size] = data[source : source + size]


_MUTATIONS: tuple[Mutation, ...] = (_flip, _flip, _overwrite, _number, _cut, _repeat, _move)
