"""Steps that went wrong: their rows and samples, the report, and when a run gives up.

``RUN/events.jsonl`` has a line for each: step, kind, loss, grad_norm, and the rows in question with their sources.
After a resume from an earlier checkpoint, a step may be recorded twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.packs import Source
from pipeline.checkpoints.writing import DivergedError
from pipeline.data.batches import StepBatch
from pipeline.parallel.zero3 import StepResult
from pipeline.planning.run_plan import RunPlan
from pipeline.training.metrics import recent_losses
from pipeline.training.run.folder import RunFolder

WINDOW, LEAST = 64, 16
"""Steps that a loss is compared with, and the minimum number of them."""
LEAST_MAD = 5e-3
"""Minimum deviation in nats: nearly constant losses are no measure of a spike."""
GRADIENT = "gradient not finite"
RECORDED_ROWS, RECORDED_SOURCES = 16, 16
"""Rows of an event, and samples of each row: an event is one short line."""
WORST = 4
"""Number of micro-batches in the report of a loss spike."""


class LossHistory:
    """The losses of the last steps, with median and median absolute deviation (MAD), both robust to outliers."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """Start with the losses before a resume; non-finite ones are dropped."""
        self._losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Add a loss; return its distance in MADs above the previous median, or None while there are too few losses."""
        if not math.isfinite(loss):
            return None
        before = np.array(self._losses)
        self._losses.append(loss)
        if len(before) < LEAST:
            return None
        median = float(np.median(before))
        return (loss - median) / max(float(np.median(abs(before - median))), LEAST_MAD)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step."""

    step: int
    """1-based."""
    result: StepResult
    batch: StepBatch
    losses: Sequence[float]
    """Summed token loss of every micro-batch of all dp ranks, in order of rows."""

    @property
    def loss(self) -> float:
        """Mean per supervised token."""
        return sum(self.losses) / max(1, self.batch.targets)

    @property
    def not_finite(self) -> list[int]:
        """Micro-batches whose loss is not finite."""
        return [microbatch for microbatch, loss in enumerate(self.losses) if not math.isfinite(loss)]


class Incidents:
    """Checks every step: all ranks count alike, rank 0 reports."""

    def __init__(self, plan: RunPlan, folder: RunFolder, *, step: int) -> None:
        """Start at a step, with no skipped steps."""
        self._plan, self._folder = plan, folder
        self._is_rank0 = plan.topology.rank == 0
        self.skipped = 0
        """Steps skipped in a row."""
        self.healthy = True
        """Whether the last step was applied and all of its losses were finite."""
        self._history = LossHistory(
            recent_losses(folder.path / "metrics.jsonl", step, WINDOW) if self._is_rank0 else ()
        )

    def check(self, outcome: Outcome) -> None:
        """Report a step that was skipped, or whose loss is not finite or a spike.

        Raises DivergedError on all ranks alike after too many skipped steps in a row.
        """
        self.skipped = 0 if outcome.result.applied else self.skipped + 1
        self.healthy = outcome.result.applied and not outcome.not_finite
        if self._is_rank0:
            self._report(outcome)
        if self.skipped < self._plan.config.train.max_skipped_steps:
            return
        odd = outcome.not_finite
        rows = self._rows_of(outcome, odd[0]) if odd else outcome.batch.rows
        raise DivergedError(
            f"{self.skipped} steps in a row had a non-finite {'loss' if odd else 'gradient'} "
            f"(last {_span(rows)}): lower train.lr, or inspect the rows: {self._inspect(rows)}"
        )

    def _report(self, outcome: Outcome) -> None:
        odd, skipped = outcome.not_finite, "" if outcome.result.applied else ", update skipped on all ranks"
        mads, limit = self._history.add(outcome.loss), self._plan.config.log.spike_mads
        if odd:
            self._write("loss not finite", skipped, outcome, odd)
        elif skipped:
            self._write(GRADIENT, skipped, outcome, range(len(outcome.losses)))
        elif limit and mads is not None and mads > limit:
            words = f", {outcome.loss:.4f} is {mads:.1f} MADs above the recent median; worst"
            self._write("loss spike", words, outcome, self._worst(outcome), mads=mads)

    def _write(
        self, kind: str, words: str, outcome: Outcome, microbatches: Sequence[int], mads: float | None = None
    ) -> None:
        """Print and write one line; ``microbatches`` are the ones in question, the worst first."""
        rows = [row for microbatch in microbatches for row in self._rows_of(outcome, microbatch)]
        means = {
            row: self._mean(outcome, microbatch)
            for microbatch in microbatches
            for row in self._rows_of(outcome, microbatch)
        }
        code = "loss-spike" if outcome.result.applied and not outcome.not_finite else "step-skipped"
        recorded = [self._row(row, means[row]) for row in rows[:RECORDED_ROWS]]
        shown = outcome.batch.rows if kind == GRADIENT else self._rows_of(outcome, microbatches[0])
        others = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
        names = _names([source for row in shown for source in self._plan.packs[row].source])
        place = f"({_span(shown)}{others}: {names})"
        print(f"step {outcome.step}: {kind}{words} {place}; inspect: {self._inspect(shown)}", flush=True)
        self._folder.record(
            code, step=outcome.step, kind=kind, loss=_number(outcome.loss),
            grad_norm=_number(outcome.result.grad_norm), mads=None if mads is None else round(mads, 1), rows=recorded,
        )  # fmt: skip

    def _worst(self, outcome: Outcome) -> list[int]:
        means = [self._mean(outcome, microbatch) for microbatch in range(len(outcome.losses))]
        return sorted(range(len(means)), key=lambda microbatch: -means[microbatch])[:WORST]

    def _mean(self, outcome: Outcome, microbatch: int) -> float:
        """Return the loss per supervised token of a micro-batch; computed on demand, as few steps need it."""
        targets = sum(self._plan.packs.n_target(row) for row in self._rows_of(outcome, microbatch))
        return outcome.losses[microbatch] / max(1, targets)

    def _rows_of(self, outcome: Outcome, microbatch: int) -> range:
        """Return the rows of a micro-batch, numbered over all dp ranks."""
        order = self._plan.order
        return order.rows_of_microbatch(outcome.batch.rows.start, *divmod(microbatch, order.microbatches))

    def _row(self, row: int, loss: float) -> dict[str, Any]:
        """Return the record of a row; its loss is the mean of its micro-batch, null if not finite."""
        sources = [{"dataset": s.dataset, "sample": s.sample, "draw": s.draw} for s in self._plan.packs[row].source]
        return {"row": row, "loss": _number(loss), "sources": sources[:RECORDED_SOURCES]}

    def _inspect(self, rows: range) -> str:
        return f"mma-prep inspect {self._plan.config.data.packs} --row {rows.start}"


def _number(value: float) -> float | None:
    """Return a number as JSON: None if it is not finite."""
    return value if math.isfinite(value) else None


def _span(rows: range) -> str:
    return f"row {rows.start}" if len(rows) == 1 else f"rows {rows.start}..{rows.stop - 1}"


def _names(sources: Sequence[Source]) -> str:
    shown = ", ".join(f"{source.dataset} {source.sample}" for source in sources[:2])
    return f"{shown} and {len(sources) - 2} more samples" if len(sources) > 2 else shown
