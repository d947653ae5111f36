"""Steps that went wrong: what is said of them, and when a run gives up."""

from __future__ import annotations

from data_prep.errors import UserError
from pipeline.data.batches import StepBatch
from pipeline.parallel.zero3 import StepResult
from pipeline.training.blueprint import Blueprint


class Incidents:
    """Counts skipped steps; the same on every rank, reported by rank 0."""

    def __init__(self, plan: Blueprint) -> None:
        """Start with none."""
        self._plan = plan
        self._skipped = 0

    def look(self, step: int, result: StepResult, batch: StepBatch) -> None:
        """Report a step whose update was skipped. Raises UserError after too many in a row."""
        if result.applied:
            self._skipped = 0
            return
        self._skipped += 1
        rows = f"{batch.rows.start}..{batch.rows.stop - 1}"
        if self._plan.topology.rank == 0:
            text = f"step {step}: gradient not finite, update skipped on all ranks (rows {rows} of the packs)"
            print(text, flush=True)
        if self._skipped >= self._plan.config.train.max_skipped_steps:
            raise UserError(
                f"{self._skipped} steps in a row had a non-finite gradient (last rows {rows}): lower train.lr, "
                f"or look at the rows with mma-prep inspect {self._plan.config.data.packs} --row {batch.rows.start}"
            )
