"""The arithmetic of a plan: how often each corpus is drawn, in which order, and which samples share a row.

Pure functions of arrays and a seed; 1.6 million draws take a few seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
LONG_SHARE = 4
"""Samples longer than a row's ``1 / LONG_SHARE`` are placed first, longest first; the others fill up in drawn order."""
WINDOW_DRAWS = 1 << 15
"""Samples that are packed together: large enough to fill rows, small beside a run, so the blend stays even."""


def exact_draws(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` draws in proportion to ``weights`` by largest remainder; ties go to the earlier corpus.

    The result sums to ``total`` and each part is within one of ``total * weight / sum(weights)``.
    """
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return [int(count) for count in counts]


def seeded(*parts: object) -> np.random.Generator:
    """Return a generator whose stream depends on ``parts`` alone, on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def sample_order(samples: int, draws: int, seed: int, corpus: str) -> Ints:
    """Return ``draws`` sample numbers: concatenated seeded permutations, so each epoch holds every sample once."""
    epochs = -(-draws // samples)
    orders = [seeded(seed, corpus, epoch).permutation(samples) for epoch in range(epochs)]
    return np.concatenate([*orders, np.empty(0, dtype=np.int64)])[:draws].astype(np.int64)


def interleave(draws: Sequence[int]) -> Ints:
    """Return the corpus number of every draw, spread evenly.

    The k-th draw of a corpus comes at time ``(k + 1/2) / draws``; after any ``n`` draws of all corpora, corpus ``i`` of
    ``C`` has been drawn ``n * draws[i] / sum(draws)`` times to within ``(1 + C) / 2``.
    """
    times = [(np.arange(count) + 0.5) / count for count in draws if count]
    corpora = [np.full(count, index) for index, count in enumerate(draws) if count]
    if not times:
        return np.empty(0, dtype=np.int64)
    return np.concatenate(corpora)[np.argsort(np.concatenate(times), kind="stable")].astype(np.int64)


def pack_in_order(lengths: Ints, images: Ints, length: int, max_images: int | None) -> Ints:
    """Return the row of each sample when rows are filled in the given order and none is reordered."""
    rows = np.empty(len(lengths), dtype=np.int64)
    cap = max_images if max_images is not None else int(images.sum())
    row, used, held = 0, 0, 0
    for index, (tokens, count) in enumerate(zip(lengths.tolist(), images.tolist(), strict=True)):
        if used + tokens > length or held + count > cap:
            row, used, held = row + 1, 0, 0
        rows[index] = row
        used, held = used + tokens, held + count
    return rows


def pack_windows(
    lengths: Ints, images: Ints, length: int, max_images: int | None, seed: int, window: int = WINDOW_DRAWS
) -> Ints:
    """Return the row of each sample: best fit inside windows of draws, rows shuffled within each window.

    Long samples go first, by decreasing length, because they are hard to place; short ones keep their drawn order, or
    every row would hold samples of one length, that is of one task. On lengths as in AKI's mixture (200 to 650 tokens)
    rows of 4096 come out 98 % full, against 98.3 % with all samples sorted.

    Args:
        lengths: tokens of each sample in draw order, none above ``length``.
        images: images of each sample, none above ``max_images``.
        length: tokens a row holds.
        max_images: most images a row holds; None for as many as fit.
        seed: of the rows' order inside a window.
        window: samples packed together.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    first = 0
    for number, start in enumerate(range(0, len(lengths), window)):
        part = slice(start, start + window)
        local, count = _best_fit(lengths[part], images[part], length, max_images)
        rows[part] = first + seeded(seed, "rows", number).permutation(count)[local]
        first += count
    return rows


def better_length(lengths: Ints, images: Ints, length: int, max_images: int | None) -> tuple[int, float]:
    """Return the row length near ``length`` (half to twice, multiples of 64) that packs fullest, and how full.

    Judged on the first window of draws; nearer lengths win ties.
    """
    lengths, images = lengths[:WINDOW_DRAWS], images[:WINDOW_DRAWS]
    longest = int(lengths.max())
    nearby = [size for size in range(max(64, length // 128 * 64), 2 * length + 1, 64) if size >= longest]
    full = {size: fullness(lengths, pack_windows(lengths, images, size, max_images, 0), size) for size in nearby}
    best = max(full, key=lambda size: (round(full[size], 3), -abs(size - length)), default=length)
    return best, full.get(best, 0.0)


def fullness(lengths: Ints, rows: Ints, length: int) -> float:
    """Return the share of a row's positions that hold tokens, over all rows."""
    return float(lengths.sum() / (int(rows.max()) + 1) / length)


def _best_fit(lengths: Ints, images: Ints, length: int, max_images: int | None) -> tuple[Ints, int]:
    """Best fit of one window: rows of the samples, and the number of rows.

    ``open_rows[slots][free]`` holds rows with so much room, and bit ``free`` of ``masks[slots]`` says that there is
    one, so the fullest row a sample fits is the lowest set bit at or above its length.
    """
    slots_of_new = max_images or 0
    needs = images if max_images is not None else np.zeros_like(images)
    open_rows: list[dict[int, list[int]]] = [{} for _ in range(slots_of_new + 1)]
    masks = [0] * (slots_of_new + 1)
    rows = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    order = np.argsort(np.where(lengths * LONG_SHARE > length, -lengths, 0), kind="stable")
    for index, tokens, need in zip(order.tolist(), lengths[order].tolist(), needs[order].tolist(), strict=True):
        best, best_slots = length + 1, -1
        for slots in range(need, slots_of_new + 1):
            fitting = masks[slots] >> tokens
            if fitting:
                free = tokens + (fitting & -fitting).bit_length() - 1
                if free < best:
                    best, best_slots = free, slots
        if best_slots < 0:
            row, best, best_slots = opened, length, slots_of_new
            opened += 1
        else:
            stack = open_rows[best_slots][best]
            row = stack.pop()
            if not stack:
                masks[best_slots] ^= 1 << best
        rows[index] = row
        free, slots = best - tokens, best_slots - need
        stack = open_rows[slots].setdefault(free, [])
        if not stack:
            masks[slots] |= 1 << free
        stack.append(row)
    return rows, opened
