"""The statistics of a study against slow oracles, and on simulated studies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.study import ALPHA, World, simulate
from pipeline.study.statistics import estimate, holm, interval, permutation_p, resampled_means, smallest_p


@pytest.mark.parametrize("differences", [[0.1, 0.2, -0.05], [0.3], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 2.0, 0.5, 0.25]])
def test_the_permutation_test_counts_sign_flips(differences: list[float]) -> None:
    observed = abs(sum(differences) / len(differences))
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)) / len(differences))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= observed - 1e-12 for value in flips) / len(flips)
    assert permutation_p(np.array(differences)) == pytest.approx(expected)


def test_many_seeds_are_permuted_at_random() -> None:
    generator = np.random.default_rng(0)
    weak = generator.normal(0.1, 1, 20)
    exact = np.mean(
        [abs(np.mean(weak * signs)) >= abs(weak.mean()) for signs in generator.choice((1, -1), (20_000, 20))]
    )
    assert permutation_p(weak) == pytest.approx(exact, abs=0.02)
    assert 0 < permutation_p(np.full(20, 1.0)) < 1e-3, "never 0"


def test_the_smallest_p_is_reached_when_all_seeds_agree() -> None:
    for seeds in range(1, 11):
        assert permutation_p(np.linspace(1, 2, seeds)) == smallest_p(seeds)


def test_holm_by_the_definition() -> None:
    """Reject the k smallest p-values as long as p(i) <= alpha / (m - i + 1): adjusted p <= alpha exactly then."""
    generator = np.random.default_rng(3)
    for _ in range(50):
        p_values = generator.random(6) ** 3
        adjusted = holm(p_values.tolist())
        for alpha in (0.01, 0.05, 0.2, 0.5):
            rejected: set[int] = set()
            for rank, at in enumerate(np.argsort(p_values)):
                if p_values[at] > alpha / (len(p_values) - rank):
                    break
                rejected.add(int(at))
            assert {at for at, value in enumerate(adjusted) if value <= alpha} == rejected
    assert holm([]) == [] and holm([0.4, 0.9]) == [0.8, 0.9]


def test_a_resample_is_the_mean_of_what_was_drawn() -> None:
    generator = np.random.default_rng(4)
    values = generator.random((3, 5))
    seeds, questions = (generator.multinomial(n, np.full(n, 1 / n), size=7) for n in (3, 5))
    for at, mean in enumerate(resampled_means(values, seeds, questions)):
        drawn = np.repeat(np.repeat(values, seeds[at], axis=0), questions[at], axis=1)
        assert drawn.shape == (3, 5) and mean == pytest.approx(drawn.mean())


def test_the_interval_of_one_seed_is_that_of_the_mean_over_questions() -> None:
    values = (np.random.default_rng(5).random((1, 2000)) < 0.3).astype(np.float64)
    low, high = interval(values)
    spread = 1.96 * math.sqrt(values.var() / 2000)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.004)


def test_the_interval_holds_the_spread_of_both_samples() -> None:
    """Runs that differ and questions that do not: as wide as a normal interval over seeds, and the reverse."""
    runs = np.repeat(np.random.default_rng(6).normal(0, 1, (40, 1)), 50, axis=1)
    for values in (runs, runs.T):
        low, high = interval(values, resamples=4000)
        mean, sd = values.mean(), float(runs[:, 0].std(ddof=1))
        assert (low, high) == pytest.approx(
            (mean - 1.96 * sd / math.sqrt(40), mean + 1.96 * sd / math.sqrt(40)), abs=0.05
        )


def test_an_estimate_says_when_there_is_one_seed() -> None:
    assert estimate(np.ones((1, 3))).sd is None
    assert estimate(np.array([[0.0, 1.0], [1.0, 1.0]])).sd == pytest.approx(math.sqrt(0.125))


def test_false_positives_are_within_three_points_of_nominal() -> None:
    """200 studies of the same arm twice, with luck of training and ease of questions."""
    null = simulate(World(), gap=0.0, studies=200)
    assert abs(null.rejected - ALPHA) <= 0.03
    assert null.covered >= 0.88


def test_a_known_gap_is_found() -> None:
    assert simulate(World(), gap=0.8, studies=50).rejected >= 0.9
    assert (
        simulate(World(luck=0.05), gap=0.2, studies=50).rejected
        > simulate(World(luck=1.0), gap=0.2, studies=50).rejected
    )
