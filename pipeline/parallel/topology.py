"""The grid of ranks: pipeline stages x data-parallel ranks.

``rank = stage * dp + dp_rank``: the data-parallel ranks of a stage are neighbours, so ZeRO-3's gathers and reductions
stay inside a node and only activations cross nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import ConfigError


@dataclass(frozen=True)
class Topology:
    """Place of one rank in the grid."""

    world: int
    rank: int
    pp: int

    def __post_init__(self) -> None:
        if self.world % self.pp:
            raise ConfigError(
                f"parallel.pp={self.pp} does not divide {self.world} ranks: start a multiple of {self.pp} ranks, "
                f"or set --parallel.pp to one of {', '.join(str(n) for n in divisors(self.world))}"
            )

    @property
    def dp(self) -> int:
        """Data-parallel ranks of each stage."""
        return self.world // self.pp

    @property
    def stage(self) -> int:
        """Pipeline stage of this rank, from 0."""
        return self.rank // self.dp

    @property
    def dp_rank(self) -> int:
        """Data-parallel index of this rank within its stage, from 0."""
        return self.rank % self.dp

    @property
    def first(self) -> bool:
        """Whether this rank embeds tokens and images."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.pp - 1

    def rank_of(self, stage: int, dp_rank: int) -> int:
        """Return the global rank at a place of the grid."""
        return stage * self.dp + dp_rank

    def stage_ranks(self, stage: int) -> list[int]:
        """Return the ranks that hold one stage: a data-parallel group."""
        return [self.rank_of(stage, dp_rank) for dp_rank in range(self.dp)]


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def micro_batches(global_batch_size: int, dp: int, asked: int) -> tuple[int, int]:
    """Split the global batch: return (micro-batches per data-parallel rank, rows per micro-batch).

    Raises ConfigError where ``global_batch_size`` rows cannot be divided evenly.
    """
    if global_batch_size % dp:
        near = ", ".join(str(n) for n in divisors(global_batch_size))
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} does not divide among {dp} data-parallel ranks: "
            f"use a multiple of {dp}, or one of {near} ranks"
        )
    own = global_batch_size // dp
    count = asked or own
    if own % count:
        near = ", ".join(str(n) for n in divisors(own))
        raise ConfigError(
            f"parallel.micro_batches={count} does not divide the {own} rows of a data-parallel rank "
            f"(train.global_batch_size={global_batch_size} / {dp} ranks): use one of {near}"
        )
    return count, own // count
