"""Which packed rows a rank trains at a step: pure arithmetic on one integer of state.

Global batch ``k`` is packs ``[k * G, (k + 1) * G)`` whatever the number of ranks, so a run can resume on another
number of data-parallel ranks and still see the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """Shares global batches of ``batch_packs`` rows between replicas and their micro-batches."""

    batch_packs: int
    replicas: int
    micros: int

    def __post_init__(self) -> None:
        assert self.batch_packs % (self.replicas * self.micros) == 0, "see topology.micro_batches"

    @property
    def micro_packs(self) -> int:
        """Rows of one micro-batch."""
        return self.batch_packs // (self.replicas * self.micros)

    def global_rows(self, consumed_packs: int) -> range:
        """Return the rows of the next step, over all replicas."""
        return range(consumed_packs, consumed_packs + self.batch_packs)

    def micro_rows(self, consumed_packs: int, replica: int, micro: int) -> range:
        """Return the rows of one micro-batch of one replica at the next step."""
        start = consumed_packs + (replica * self.micros + micro) * self.micro_packs
        return range(start, start + self.micro_packs)
