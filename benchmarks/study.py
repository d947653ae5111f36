"""Are the statistics of ``mma study`` right? Simulated studies: false positives under the null, coverage, power.

    python -m benchmarks.study                      a minute on one core
    python -m benchmarks.study --studies 200 --seeds 8

A simulated run answers each question right with a probability whose logit is the arm's skill, plus the luck of its
training (a normal number per run), plus the ease of the question (a normal number per question, shared by all runs).
The null is the same arm twice: no difference of skill, but two trainings.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from pipeline.study.statistics import FloatArray, estimate, permutation_p, smallest_p

ALPHA = 0.05


@dataclass(frozen=True)
class World:
    """What simulated studies are drawn from."""

    seeds: int = 8
    questions: int = 300
    skill: float = 1.0
    """Logit of a mean run on a mean question."""
    luck: float = 0.3
    """Standard deviation of the runs' logits."""
    ease: float = 1.5
    """Standard deviation of the questions' logits."""

    def answers(self, generator: np.random.Generator, gap: float) -> tuple[FloatArray, FloatArray]:
        """Return float64[S, Q] of the baseline, and of an arm whose skill is higher by ``gap`` (a logit)."""
        ease = generator.normal(0, self.ease, self.questions)
        arms = []
        for skill in (self.skill, self.skill + gap):
            logits = skill + generator.normal(0, self.luck, (self.seeds, 1)) + ease
            arms.append((generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64))
        return arms[0], arms[1]

    def true_gap(self, gap: float) -> float:
        """Return the difference of the arms' expected accuracies, by a large draw."""
        generator = np.random.default_rng(1)
        luck, ease = generator.normal(0, self.luck, 400_000), generator.normal(0, self.ease, 400_000)
        means = [float((1 / (1 + np.exp(-(skill + luck + ease)))).mean()) for skill in (self.skill, self.skill + gap)]
        return means[1] - means[0]


@dataclass(frozen=True)
class Rates:
    """Shares of simulated studies."""

    rejected: float
    """p at most `ALPHA`."""
    covered: float
    """The 95 % interval holds the true difference."""


def simulate(world: World, *, gap: float, studies: int, seed: int = 0, resamples: int = 300) -> Rates:
    """Return how often studies of a world find a difference, and how often their intervals are right."""
    generator, truth, rejected, covered = np.random.default_rng(seed), world.true_gap(gap), 0, 0
    for _ in range(studies):
        base, arm = world.answers(generator, gap)
        differences = arm - base
        rejected += permutation_p(differences.mean(1)) <= ALPHA
        found = estimate(differences, resamples=resamples)
        covered += found.low <= truth <= found.high
    return Rates(rejected / studies, covered / studies)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 8, 10])
    options = parser.parse_args()
    print(f"{options.studies} studies each; nominal level {ALPHA:g}; 'true gap' in points of accuracy")
    print(f"{'seeds':>5} {'smallest p':>10} {'true gap':>9} {'found':>7} {'interval covers':>16}")
    for seeds in options.seeds:
        world = World(seeds=seeds)
        for gap in (0.0, 0.2, 0.4, 0.8):
            rates = simulate(world, gap=gap, studies=options.studies)
            points = 100 * world.true_gap(gap)
            print(f"{seeds:>5} {smallest_p(seeds):>10.4f} {points:>9.1f} {rates.rejected:>7.1%} {rates.covered:>16.1%}")


if __name__ == "__main__":
    main()
