"""Which packed rows a rank trains at a step: pure arithmetic on one integer of state.

Global batch ``k`` is packs ``[k * G, (k + 1) * G)`` whatever the number of ranks, so a run can resume on another
number of data-parallel ranks and still see the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """Shares global batches of ``global_batch_size`` rows between replicas and their micro-batches."""

    global_batch_size: int
    dp: int
    microbatches: int

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.dp * self.microbatches) == 0, "see topology.micro_batches"

    @property
    def microbatch_rows(self) -> int:
        """Rows of one micro-batch."""
        return self.global_batch_size // (self.dp * self.microbatches)

    def global_rows(self, consumed_packs: int) -> range:
        """Return the rows of the next step, over all replicas."""
        return range(consumed_packs, consumed_packs + self.global_batch_size)

    def rows_of_microbatch(self, consumed_packs: int, dp_rank: int, microbatch: int) -> range:
        """Return the rows of one micro-batch of one replica at the next step."""
        start = consumed_packs + (dp_rank * self.microbatches + microbatch) * self.microbatch_rows
        return range(start, start + self.microbatch_rows)
