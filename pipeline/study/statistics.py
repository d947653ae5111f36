"""Statistics of a study: pure functions on arrays. S seeds, Q questions, R resamples.

``right_SQ`` holds 1 where the run of a seed answered a question right, else 0. Seeds and questions are both samples: of
trainings, and of what could have been asked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
EXACT_SEEDS = 14
"""Up to so many seeds all 2**S sign flips are counted; above, as many random ones are."""
_TIE = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and questions."""

    mean: float
    sd: float | None
    """Standard deviation of the seeds' means (n - 1); None with a single seed."""
    low: float
    high: float
    """95 % interval, bootstrapped over seeds and questions; with a single seed over questions alone."""


def estimate(values_SQ: FloatArray, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return mean, standard deviation over seeds and interval of values float64[S, Q]."""
    of_seeds = values_SQ.mean(1)
    sd = float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else None
    return Estimate(float(values_SQ.mean()), sd, *interval(values_SQ, resamples=resamples, seed=seed))


def interval(
    values_SQ: FloatArray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the mean under a bootstrap that draws seeds and questions independently.

    A bootstrap of n values is too narrow by sqrt((n - 1) / n), which matters for a few seeds: the deviations from the
    mean are widened by its inverse. Percentiles of few seeds stay optimistic; `benchmarks.study` prints the coverage.
    """
    seeds, questions = values_SQ.shape
    generator = np.random.default_rng(seed)
    draws = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (seeds, questions)]
    mean = float(values_SQ.mean())
    wider = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    means = mean + wider * (resampled_means(values_SQ, *draws) - mean)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(values_SQ: FloatArray, seeds_RS: IntArray, questions_RQ: IntArray) -> FloatArray:
    """Return float64[R]: the mean of each resample, given how often it draws every seed and every question."""
    sums_RQ = seeds_RS.astype(np.float64) @ values_SQ
    weights = seeds_RS.sum(1) * questions_RQ.sum(1)
    return np.asarray(np.einsum("rq,rq->r", sums_RQ, questions_RQ.astype(np.float64)) / weights)


def permutation_p(differences_S: FloatArray, *, seed: int = 0) -> float:
    """Return the two-sided p-value of a paired permutation test over seeds.

    Under the null hypothesis the two runs of a seed are exchangeable, so the sign of each difference is arbitrary. The
    statistic is the mean difference. Questions are not permuted: all answers of a run share the luck of its training.
    """
    count = len(differences_S)
    observed = abs(float(differences_S.mean()))
    if count <= EXACT_SEEDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return float((np.abs(signs @ differences_S) / count >= observed - _TIE).mean())
    signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(1 << EXACT_SEEDS, count))
    extreme = int((np.abs(signs @ differences_S) / count >= observed - _TIE).sum())
    return (extreme + 1) / (len(signs) + 1)


def smallest_p(seeds: int) -> float:
    """Return the smallest p-value that `permutation_p` can give for so many seeds: all differences of one sign."""
    return 2.0 / 2 ** min(seeds, EXACT_SEEDS) if seeds else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for all comparisons together, in the given order (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted
