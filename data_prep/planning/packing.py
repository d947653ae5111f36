"""The arithmetic of a plan: how often each corpus is drawn, in which order, and which samples share a row.

Pure functions of arrays and a seed; 1.6 million draws take about a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_prep.common.seeding import seeded

Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32] | Ints
Numbers = npt.NDArray[np.uint32] | Ints
LONG_SHARE = 4
"""Samples longer than a row's ``1 / LONG_SHARE`` are placed first, longest first."""
RESERVE_SHARE = 5
"""The others fill rows in draw order, except the last ``1 / RESERVE_SHARE`` of a row; the rest is placed by best fit.

Finding the best fit costs ten times as much as taking the next row, and these samples fit as well either way.
"""
FILLER_SHARE = 10
"""The shortest ``1 / FILLER_SHARE`` of the others are placed last: they fit where nothing else does."""
WINDOW_DRAWS = 1 << 15
"""Samples packed together: enough to fill rows, few enough for the blend to stay even over the run."""
MAX_SLOTS = 64
"""Slots of a row for a limit of image tokens."""
CHUNK_DRAWS = 32 * WINDOW_DRAWS
"""Draws that are planned at a time: memory does not grow with the run."""
JUDGED_DRAWS = 1 << 13
"""Draws from which the efficiency of other row lengths is estimated."""
_SCATTER = 0x9E3779B1  # 2 ** 32 / golden ratio: its multiples are spread evenly


def exact_draws(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` draws in proportion to ``weights`` by largest remainder; ties go to the earlier corpus.

    The result sums to ``total`` and each part is within one of ``total * weight / sum(weights)``.
    """
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return [int(count) for count in counts]


def sample_order(samples: int, draws: int, seed: int, corpus: str) -> Iterator[Numbers]:
    """Yield ``draws`` sample numbers, epoch by epoch: seeded permutations, so each holds every sample once."""
    for epoch in range(-(-draws // samples)):
        yield epoch_order(samples, draws, seed, corpus, epoch)


def epoch_order(samples: int, draws: int, seed: int, corpus: str, epoch: int) -> Numbers:
    """Return the sample numbers of one epoch of `sample_order`; the last one may be cut."""
    return _permutation(seeded(seed, corpus, epoch), samples, min(samples, draws - epoch * samples))


def _permutation(generator: np.random.Generator, size: int, count: int) -> Numbers:
    """Return the first ``count`` numbers of a permutation of ``size``, by sorting random keys as far as needed.

    The low bits of a key hold its number, so all keys differ and any sort gives the same order.
    """
    bits = size.bit_length()
    keys = generator.integers(0, 1 << 63 - bits, size, dtype=np.int64)
    keys <<= bits
    for start in range(0, size, CHUNK_DRAWS):
        part = keys[start : start + CHUNK_DRAWS]
        part |= np.arange(start, start + len(part))
    if count < size:
        keys.partition(count)
        keys = keys[:count].copy()
    keys.sort()
    keys &= (1 << bits) - 1
    return keys.astype(np.uint32) if bits <= 32 else keys


def interleave(draws: Sequence[int]) -> Iterator[npt.NDArray[np.int16]]:
    """Yield the corpus number of every draw, spread evenly, about ``CHUNK_DRAWS`` at a time.

    The k-th draw of a corpus comes at time ``(k + 1/2) / draws``; after any ``n`` draws of all corpora, corpus ``i`` of
    ``C`` has been drawn ``n * draws[i] / sum(draws)`` times to within ``(1 + C) / 2``.
    """
    chunks = max(1, -(-sum(draws) // CHUNK_DRAWS))
    starts = [0] * len(draws)
    for chunk in range(1, chunks + 1):
        ends = [_draws_before(chunk / chunks, count) if chunk < chunks else count for count in draws]
        spans = list(zip(starts, ends, strict=True))
        times = [(np.arange(*span) + 0.5) / max(1, count) for span, count in zip(spans, draws, strict=True)]
        corpora = np.repeat(np.arange(len(draws), dtype=np.int16), [end - start for start, end in spans])
        yield corpora[np.argsort(np.concatenate(times), kind="stable")]
        starts = ends


def _draws_before(time: float, count: int) -> int:
    """Return how many draws of a corpus come before a time, by the same rounded division as `interleave`."""
    found = min(count, max(0, int(time * count)))
    while found < count and (found + 0.5) / count < time:
        found += 1
    while found and (found - 0.5) / count >= time:
        found -= 1
    return found


def token_slots(image_tokens: Counts, most: int) -> tuple[Ints, int]:
    """Return a limit of image tokens in slots: those of each sample, rounded up, and those of a row, at most 64.

    Packing tries every number of free slots, so their number must be small.
    """
    slot = -(-most // MAX_SLOTS)
    slots = most // slot
    return np.minimum(-(-image_tokens.astype(np.int64) // slot), slots), slots


def pack_in_order(lengths: Counts, images: Counts, seq_len: int, max_images: int | None) -> Ints:
    """Return the row of each sample if rows are filled in the given order."""
    return InOrder(seq_len, max_images).place(lengths, images)


class Packer(Protocol):
    """Places samples, which come in chunks, into rows; rows of later chunks have no smaller numbers."""

    def place(self, lengths: Counts, images: Counts) -> Ints:
        """Return the row of each sample of the next chunk."""


class InOrder:
    """Fills rows in the given order."""

    def __init__(self, seq_len: int, max_images: int | None) -> None:
        """Pack rows of ``seq_len`` tokens and at most ``max_images`` images; None for no limit."""
        self._length, self._cap = seq_len, max_images
        self._row = self._used = self._held = 0

    def place(self, lengths: Counts, images: Counts) -> Ints:
        """Return the row of each sample of the next chunk."""
        rows, row, used, held = np.empty(len(lengths), dtype=np.int64), self._row, self._used, self._held
        for index, (tokens, count) in enumerate(zip(lengths.tolist(), images.tolist(), strict=True)):
            if used + tokens > self._length or (self._cap is not None and held + count > self._cap):
                row, used, held = row + 1, 0, 0
            rows[index] = row
            used, held = used + tokens, held + count
        self._row, self._used, self._held = row, used, held
        return rows


def pack_windows(
    lengths: Counts, images: Counts, seq_len: int, max_images: int | None, seed: int, window: int = WINDOW_DRAWS
) -> Ints:
    """Return the row of each sample: best fit inside windows of draws, rows shuffled within each window.

    Long samples are placed first, longest first, because they are hard to place. Most short ones keep their draw order;
    sorted, every row would hold samples of one length, that is of one task. With lengths as in AKI's mixture (200 to
    650 tokens), rows of 4096 are 98 to 99.7 % full, the same as with all samples sorted.

    Args:
        lengths: tokens of each sample in draw order, none above ``seq_len``.
        images: images of each sample, none above ``max_images``.
        seq_len: tokens per row.
        max_images: maximum images per row; None for no limit.
        seed: seed of the row order inside a window.
        window: samples packed together.
    """
    return InWindows(seq_len, max_images, seed, window).place(lengths, images)


class InWindows:
    """Packs window after window, see `pack_windows`. Only the last chunk may end inside a window."""

    def __init__(self, seq_len: int, max_images: int | None, seed: int, window: int = WINDOW_DRAWS) -> None:
        """Pack rows of ``seq_len`` tokens; the other arguments are those of `pack_windows`."""
        self._limits, self._seed, self._window = (seq_len, max_images), seed, window
        self._first, self._number = 0, 0
        self._more: int | None = None

    def place(self, lengths: Counts, images: Counts) -> Ints:
        """Return the row of each sample of the next chunk."""
        rows = np.empty(len(lengths), dtype=np.int64)
        for start in range(0, len(lengths), self._window):
            part = slice(start, start + self._window)
            known = self._more if start + self._window <= len(lengths) else None  # whole windows hold the same blend
            local, count, self._more = _pack_window(lengths[part], images[part], *self._limits, known)
            rows[part] = self._first + seeded(self._seed, "rows", self._number).permutation(count)[local]
            self._first, self._number = self._first + count, self._number + 1
        return rows


def better_seq_len(lengths: Counts, images: Counts, seq_len: int, max_images: int | None) -> tuple[int, float]:
    """Return the row length near ``seq_len`` that packs best, and its efficiency; ties go to the nearer."""
    full = efficiency_by_seq_len(lengths, images, seq_len, max_images)
    best = max(full, key=lambda size: (round(full[size], 3), -abs(size - seq_len)), default=seq_len)
    return best, full.get(best, 0.0)


def efficiency_by_seq_len(lengths: Counts, images: Counts, seq_len: int, max_images: int | None) -> dict[int, float]:
    """Return the packing efficiency of row lengths near ``seq_len``: multiples of 64 from half to twice, and itself.

    Estimated from the first draws; lengths that cannot hold the longest sample are skipped.
    """
    lengths, images = lengths[:JUDGED_DRAWS], images[:JUDGED_DRAWS]
    nearby = sorted({seq_len, *range(max(64, seq_len // 128 * 64), 2 * seq_len + 1, 64)})
    rows = {size: pack_windows(lengths, images, size, max_images, 0) for size in nearby if size >= lengths.max()}
    return {size: packing_efficiency(lengths, placed, size) for size, placed in rows.items()}


def packing_efficiency(lengths: Counts, rows: Ints, seq_len: int) -> float:
    """Return the share of positions that hold tokens, over all rows."""
    return float(lengths.sum() / (int(rows.max()) + 1) / seq_len)


class _OpenRows:
    """The rows of a window that have space left.

    ``rows`` holds stacks of rows by free image slots and free tokens; ``frees`` lists the free tokens that occur,
    sorted, so bisection finds the fullest row that a sample fits. Rows with less than ``least`` free tokens are closed.
    """

    def __init__(self, seq_len: int, slots: int, least: int) -> None:
        self._length, self._slots, self._least = seq_len, slots, least
        self._rows: list[dict[int, list[int]]] = [{} for _ in range(slots + 1)]
        self._frees: list[list[int]] = [[] for _ in range(slots + 1)]
        self.count = 0

    @property
    def room(self) -> int:
        """Free tokens over all rows."""
        return sum(free * len(rows) for stacks in self._rows for free, rows in stacks.items())

    def open(self, tokens: Counts, images: Counts) -> None:
        """Add rows that already hold these tokens and images."""
        frees, slots = self._length - tokens, self._slots - images
        order = np.lexsort((frees, slots))
        rows = iter((self.count + order).tolist())
        for free, left, count in _runs(frees[order], slots[order]):
            self._keep(list(islice(rows, count)), free, left)
        self.count += len(tokens)

    def place(self, tokens: Counts, images: Counts) -> list[int]:
        """Return the best-fitting row of each sample in turn, or a new row if it fits none.

        Runs of equal samples are placed together: the best row for one is the best for the next until it is full;
        then follows another row with as much space.
        """
        found: list[int] = []
        for size, need, left in _runs(tokens, images):
            while left:
                free, slots = self._best(size, need)
                each = min(free // size, slots // need) if need else free // size
                rows = self._take(free, slots, -(-left // each))
                placed = min(left, len(rows) * each)
                found += rows if each == 1 else [row for row in rows for _ in range(each)][:placed]
                whole, rest = divmod(placed, each)
                self._keep(rows[:whole], free - each * size, slots - each * need)
                if rest:
                    self._keep(rows[whole:], free - rest * size, slots - rest * need)
                left -= placed
        return found

    def _best(self, size: int, need: int) -> tuple[int, int]:
        """Return the free tokens and image slots of the fullest rows that a sample fits, or those of a new row."""
        best, slots = self._length + 1, -1
        for more in range(need, self._slots + 1):
            frees = self._frees[more]
            at = bisect_left(frees, size)
            if at < len(frees) and frees[at] < best:
                best, slots = frees[at], more
        return (self._length, self._slots) if slots < 0 else (best, slots)

    def _take(self, free: int, slots: int, most: int) -> list[int]:
        """Take up to ``most`` rows with this much space, latest first; new rows if there are none."""
        stack = self._rows[slots].get(free)
        if stack is None:
            self.count += most
            return list(range(self.count - most, self.count))
        rows = stack[: -most - 1 : -1]
        del stack[-most:]
        if not stack:
            del self._rows[slots][free], self._frees[slots][bisect_left(self._frees[slots], free)]
        return rows

    def _keep(self, rows: list[int], free: int, slots: int) -> None:
        if free < self._least or not rows:
            return
        stack = self._rows[slots].get(free)
        if stack:
            stack += rows
        else:
            self._rows[slots][free] = rows
            insort(self._frees[slots], free)


def _runs(tokens: Counts, images: Counts) -> Iterator[tuple[int, int, int]]:
    """Yield tokens, images and length of each run of equal samples."""
    changes = np.flatnonzero((np.diff(tokens) != 0) | (np.diff(images) != 0)) + 1
    starts = np.concatenate([[0], changes]) if len(tokens) else changes
    counts = np.diff(np.append(starts, len(tokens)))
    yield from zip(tokens[starts].tolist(), images[starts].tolist(), counts.tolist(), strict=True)


def _pack_window(
    lengths: Counts, images: Counts, seq_len: int, max_images: int | None, more: int | None
) -> tuple[Ints, int, int]:
    """Return the row of each sample of one window, the number of rows, and ``more``.

    Args:
        lengths: see ``pack_windows``.
        images: see there.
        seq_len: see there.
        max_images: see there.
        more: rows to fill in order beyond the number needed without gaps; None to determine it.
    """
    slots, needs = (0, np.zeros_like(images)) if max_images is None else (max_images, images)
    window = _Window(lengths, needs, seq_len, slots)
    rows, count, left_over = window.pack(more or 0)
    if more is None and left_over > 1:  # lengths leave gaps: fill that many more rows in order
        again, fewer, _ = window.pack(left_over)
        if fewer <= count:
            return again, fewer, left_over
    return rows, count, more or 0


class _Window:
    """The samples of one window: long ones, those that fill rows in order, and fillers placed last."""

    def __init__(self, lengths: Counts, needs: Counts, seq_len: int, slots: int) -> None:
        self._lengths, self._needs, self._length, self._slots = lengths, needs, seq_len, slots
        long = (lengths * LONG_SHARE > seq_len) | (needs > slots - slots // RESERVE_SHARE)
        self._longs = _longest_first(np.flatnonzero(long), lengths)
        self._ordered, self._fillers = _split_fillers(np.flatnonzero(~long), lengths)
        self._tokens, self._images = (np.cumsum(np.append(0, values[self._ordered])) for values in (lengths, needs))
        self._bounds = np.array(_bounds(self._tokens, self._images, seq_len, slots))

    def pack(self, more: int) -> tuple[Ints, int, int]:
        """Return the row of each sample, the number of rows, and how many of them were opened at the end.

        ``more`` rows are filled in order beyond the number needed without gaps.
        """
        rows = np.empty(len(self._lengths), dtype=np.int64)
        open_rows = _OpenRows(self._length, self._slots, int(self._lengths.min()))
        rows[self._longs] = open_rows.place(self._lengths[self._longs], self._needs[self._longs])
        bounds = self._bounds[: 1 + self._filled_in_order(open_rows.room, more)]
        rows[self._ordered[: bounds[-1]]] = np.repeat(np.arange(len(bounds) - 1) + open_rows.count, np.diff(bounds))
        open_rows.open(np.diff(self._tokens[bounds]), np.diff(self._images[bounds]))
        left = _longest_first(np.append(self._ordered[bounds[-1] :], self._fillers), self._lengths)
        before = open_rows.count
        rows[left] = open_rows.place(self._lengths[left], self._needs[left])
        return rows, open_rows.count, open_rows.count - before

    def _filled_in_order(self, room: int, more: int) -> int:
        """Return how many rows to fill in order: enough for the samples that do not fit into ``room``."""
        tokens = int(self._tokens[-1] + self._lengths[self._fillers].sum()) - room
        return max(0, tokens // self._length + more, int(self._images[-1]) // self._slots if self._slots else 0)


def _longest_first(samples: Ints, lengths: Counts) -> Ints:
    """Return samples by decreasing length; equal ones keep their order."""
    sizes = lengths[samples]
    longest = int(sizes.max(initial=0))
    return samples[np.argsort((longest - sizes).astype(np.min_scalar_type(longest)), kind="stable")]  # by radix


def _split_fillers(samples: Ints, lengths: Counts) -> tuple[Ints, Ints]:
    """Return the short samples that fill rows in order, and the shortest ones, which are placed last.

    Among equal samples, the fillers are scattered over the window.
    """
    count = len(samples) // FILLER_SHARE
    keys = lengths[samples].astype(np.int64) << 32 | np.arange(len(samples)) * _SCATTER & 0xFFFFFFFF
    fillers = np.argpartition(keys, count)[:count] if count else np.empty(0, dtype=np.int64)
    fillers = fillers[np.argsort(keys[fillers])]
    return np.delete(samples, fillers), samples[fillers]


def _bounds(tokens: Counts, images: Counts, seq_len: int, slots: int) -> list[int]:
    """Return the bounds of rows if samples fill all but the reserve of each row in order.

    No sample is longer, or has more images, than a row without its reserve.

    Args:
        tokens: cumulative tokens, starting with 0.
        images: cumulative images, starting with 0.
        seq_len: tokens per row.
        slots: images per row.
    """
    fitting = np.searchsorted(tokens, tokens + (seq_len - seq_len // RESERVE_SHARE), side="right")
    if slots:
        most = images + (slots - slots // RESERVE_SHARE)
        fitting = np.minimum(fitting, np.searchsorted(images, most, side="right"))
    following = (fitting - 1).tolist()
    bounds = [0]
    while bounds[-1] < len(tokens) - 1:
        bounds.append(following[bounds[-1]])
    return bounds
