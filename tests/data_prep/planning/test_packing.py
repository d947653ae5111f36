from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.planning import packing
from data_prep.planning.packing import (
    InOrder,
    InWindows,
    _OpenRows,
    better_seq_len,
    exact_draws,
    interleave,
    pack_in_order,
    pack_windows,
    packing_efficiency,
    sample_order,
)

weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=8)
AKI_WEIGHTS = [0.103, 0.103, 0.026, 0.103, 0.103, 0.103, 0.103, 0.103, 0.103, 0.047, 0.103]


@given(weights, st.integers(1, 10_000))
@settings(max_examples=100, deadline=None)
def test_draws_are_exact(parts: list[float], total: int) -> None:
    counts = exact_draws(parts, total)
    exact = [total * part / sum(parts) for part in parts]
    assert sum(counts) == total
    assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(counts, exact, strict=True))


def test_draws_of_the_paper_are_hand_counted() -> None:
    assert exact_draws(AKI_WEIGHTS, 1_600_000) == [164800, 164800, 41600, *[164800] * 6, 75200, 164800]
    assert exact_draws([1, 1, 1], 4) == [2, 1, 1]


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once(samples: int, draws: int, seed: int) -> None:
    order = order_of(samples, draws, seed, "vqa")
    assert len(order) == draws
    for start in range(0, draws, samples):
        epoch = order[start : start + samples]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(samples))


def order_of(samples: int, draws: int, seed: int, corpus: str) -> list[int]:
    return [number for epoch in sample_order(samples, draws, seed, corpus) for number in epoch.tolist()]


def test_order_depends_on_seed_corpus_and_epoch_only() -> None:
    one = order_of(100, 200, 1, "vqa")
    assert one == order_of(100, 200, 1, "vqa")
    assert one[:150] == order_of(100, 150, 1, "vqa")
    others = [order_of(100, 200, 2, "vqa"), order_of(100, 200, 1, "llava")]
    assert one not in others and one[:100] != one[100:]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_chunks_change_neither_blend_nor_order(draws: list[int]) -> None:
    whole = np.concatenate(list(interleave(draws)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_DRAWS", 7)
        parts = list(interleave(draws))
        order = order_of(40, 90, 0, "vqa")
    assert np.array_equal(np.concatenate(parts), whole) and (len(parts) > 1) == (len(whole) > 7)
    assert order == order_of(40, 90, 0, "vqa")


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_prefix_of_the_blend_is_balanced(draws: list[int]) -> None:
    order = np.concatenate(list(interleave(draws))).tolist()
    assert Counter(order) == Counter({corpus: count for corpus, count in enumerate(draws) if count})
    bound = (1 + len(draws)) / 2
    for n in range(len(order) + 1):
        seen = Counter(order[:n])
        for corpus, count in enumerate(draws):
            assert abs(seen[corpus] - n * count / max(1, len(order))) <= bound


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 50))
@settings(max_examples=300, deadline=None)
def test_draws_before_a_time_are_counted_by_the_rounded_times_themselves(count: int, chunk: int) -> None:
    time = chunk / (1 << 50)
    before = packing._draws_before(time, count)
    assert before == 0 or (before - 0.5) / count < time
    assert before == count or (before + 0.5) / count >= time


samples_of_rows = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), max_size=300)


def check_rows(rows: np.ndarray, samples: list[tuple[int, int]], seq_len: int, cap: int | None) -> None:
    """The slow oracle: no row is overfull, none is empty, and row numbers have no gaps."""
    tokens, images = Counter[int](), Counter[int]()
    for row, (size, count) in zip(rows.tolist(), samples, strict=True):
        tokens[row] += size
        images[row] += count
    assert all(size <= seq_len for size in tokens.values())
    assert cap is None or all(count <= cap for count in images.values())
    assert sorted(tokens) == list(range(len(tokens)))


def in_chunks(packer: packing.Packer, lengths: np.ndarray, images: np.ndarray, chunk: int) -> list[int]:
    starts = range(0, len(lengths), chunk)
    parts = (slice(start, start + chunk) for start in starts)
    return [row for part in parts for row in packer.place(lengths[part], images[part]).tolist()]


@given(samples_of_rows, st.sampled_from([None, 3, 5]), st.integers(1, 100), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_no_row_is_overfull(samples: list[tuple[int, int]], cap: int | None, window: int, seed: int) -> None:
    lengths, images = (np.array([sample[k] for sample in samples], dtype=np.int64) for k in (0, 1))
    rows = pack_windows(lengths, images, 64, cap, seed, window)
    check_rows(rows, samples, 64, cap)
    assert rows.tolist() == pack_windows(lengths, images, 64, cap, seed, window).tolist()
    assert rows.tolist() == in_chunks(InWindows(64, cap, seed, window), lengths, images, 2 * window)
    for start in range(0, len(rows) - window, window):
        assert rows[start : start + window].max() < rows[start + window :].min()


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), max_size=60), st.sampled_from([0, 3, 5]))
@settings(max_examples=100, deadline=None)
def test_each_sample_goes_where_it_fits_best(samples: list[tuple[int, int]], slots: int) -> None:
    """The slow oracle: of all rows with room for a sample, it takes one with the least room; a new one for none."""
    samples = [(size, min(count, slots)) for size, count in samples]
    lengths, images = (np.array([sample[k] for sample in samples], dtype=np.int64) for k in (0, 1))
    room: dict[int, tuple[int, int]] = {}
    for (size, need), row in zip(samples, _OpenRows(64, slots, 1).place(lengths, images), strict=True):
        fitting = {other: free for other, (free, left) in room.items() if free >= size and left >= need}
        assert fitting.get(row) == min(fitting.values()) if fitting else row == len(room)
        free, left = room.get(row, (64, slots))
        room[row] = (free - size, left - need)


@given(samples_of_rows, st.sampled_from([None, 3, 5]))
@settings(max_examples=100, deadline=None)
def test_packing_in_order_keeps_the_order(samples: list[tuple[int, int]], cap: int | None) -> None:
    lengths, images = (np.array([sample[k] for sample in samples], dtype=np.int64) for k in (0, 1))
    rows = pack_in_order(lengths, images, 64, cap)
    check_rows(rows, samples, 64, cap)
    assert rows.tolist() == sorted(rows.tolist()) == in_chunks(InOrder(64, cap), lengths, images, 11)


def aki_like(count: int) -> np.ndarray:
    """144 image tokens, a prompt, and answers from a word to a paragraph."""
    rng = np.random.default_rng(0)
    words, phrases = rng.poisson(14, count), rng.poisson(45, count)
    talks = np.clip(rng.lognormal(5.3, 0.45, count), 40, 487)
    kind = rng.choice(3, count, p=[0.6, 0.25, 0.15])
    return (169 + np.choose(kind, [words, phrases, talks])).astype(np.int64)


@pytest.mark.parametrize(("seq_len", "at_least"), [(1024, 0.93), (2048, 0.96), (4096, 0.98)])
def test_rows_come_out_full_on_lengths_as_in_the_paper(seq_len: int, at_least: float) -> None:
    lengths = aki_like(60_000)
    rows = pack_windows(lengths, np.ones_like(lengths), seq_len, None, 0)
    assert lengths.sum() / ((rows.max() + 1) * seq_len) >= at_least


def test_a_fuller_length_is_found() -> None:
    lengths = np.full(2000, 200)
    images = np.ones_like(lengths)
    assert packing_efficiency(lengths, pack_windows(lengths, images, 512, None, 0), 512) == pytest.approx(400 / 512)
    best, full = better_seq_len(lengths, images, 512, None)
    assert (best, full) == (1024, pytest.approx(1000 / 1024))  # five samples a row


def test_short_samples_are_mixed_rather_than_sorted() -> None:
    lengths = np.tile([34, 36], 500)
    rows = pack_windows(lengths, np.ones_like(lengths), 512, None, 0)
    mixed = sum(len(set(lengths[rows == row].tolist())) == 2 for row in range(rows.max() + 1))
    assert mixed >= rows.max()


def test_a_sample_with_as_many_images_as_a_row_holds_leaves_the_others_mixed() -> None:
    lengths, images = np.tile([34, 36], 500), np.zeros(1000, dtype=np.int64)
    images[1] = 5  # not among the shortest, which are kept for the end
    rows = pack_windows(lengths, images, 512, 5, 0)
    mixed = sum(len(set(lengths[rows == row].tolist())) == 2 for row in range(rows.max() + 1))
    assert mixed >= rows.max() - 1
