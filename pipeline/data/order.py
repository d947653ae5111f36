"""Which packed rows a rank trains on in each step: pure arithmetic on one integer of state.

Global batch ``k`` holds rows ``[k * G, (k + 1) * G)`` for any number of ranks, so a run that resumes on a different
number of data-parallel ranks sees the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """Divides global batches of ``global_batch_size`` rows among data-parallel ranks and their micro-batches."""

    global_batch_size: int
    dp: int
    microbatches: int

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.dp * self.microbatches) == 0, "see topology.micro_batches"

    @property
    def microbatch_rows(self) -> int:
        """Number of rows of one micro-batch."""
        return self.global_batch_size // (self.dp * self.microbatches)

    def global_rows(self, consumed_packs: int) -> range:
        """Return the rows of the next step, over all data-parallel ranks."""
        return range(consumed_packs, consumed_packs + self.global_batch_size)

    def rows_of_microbatch(self, consumed_packs: int, dp_rank: int, microbatch: int) -> range:
        """Return the rows of one micro-batch of one data-parallel rank in the next step."""
        start = consumed_packs + (dp_rank * self.microbatches + microbatch) * self.microbatch_rows
        return range(start, start + self.microbatch_rows)
