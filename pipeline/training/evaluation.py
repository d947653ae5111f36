"""Evaluation on held-out rows between two steps, by the stages and the grid of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from data_prep.packs import PackReader, Source, last_answer
from pipeline.data.batches import BatchSource
from pipeline.model.inputs import StageInputs
from pipeline.parallel.runner import Runner
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.planning.run_plan import RunPlan
from pipeline.training.run.best import ACCURACY

_SUMS = 4  # summed loss, supervised tokens, right answers, answers


@dataclass(frozen=True)
class _Part:
    """What is counted apart: the samples of one family of one corpus."""

    corpus: str
    family: str

    @classmethod
    def of(cls, source: Source) -> _Part:
        """Return the part of a sample; a corpus without families is its own family."""
        return cls(source.dataset, source.family or source.dataset)


class HeldOut:
    """The rows of one held-out folder, and the sums over their tokens and answers."""

    def __init__(self, name: str, packs: PackReader, samples: int) -> None:
        """Take the first rows that hold ``samples`` samples; 0 = all rows."""
        self.name, self.packs = name, packs
        self.rows = packs.rows_that_hold(samples)
        found = (_Part.of(source) for row in range(self.rows) for source in packs.sources(row))
        self.parts = {part: number for number, part in enumerate(dict.fromkeys(found))}

    @property
    def metrics(self) -> list[str]:
        """The names of its metrics."""
        return list(self.summarize(np.ones((1, len(self.parts), _SUMS))))

    def groups(self, dp: int, dp_rank: int, microbatches: int) -> Iterator[list[int]]:
        """Yield the rows of one data-parallel rank, ``microbatches`` at a time; -1 where it has none left."""
        size = dp * microbatches
        for first in range(0, self.rows, size):
            own = range(first + dp_rank * microbatches, first + (dp_rank + 1) * microbatches)
            yield [row if row < self.rows else -1 for row in own]

    def sums(self, row: int, inputs: StageInputs, scores_N2: torch.Tensor) -> npt.NDArray[np.float64]:
        """Return float64[parts, 4] of one row: summed loss, supervised tokens, right answers, answers.

        ``scores_N2``: loss of each supervised token, and whether it is the most likely one.
        """
        content = self.packs[row]
        scored = np.zeros((len(content.segment), 3))  # by the position of the predicted token
        assert inputs.supervised is not None
        positions = inputs.supervised.cpu().numpy() + 1
        scored[positions, :2], scored[positions, 2] = scores_N2.double().cpu().numpy(), 1
        sums = np.zeros((len(self.parts), _SUMS))
        for number, source in enumerate(content.source, start=1):
            loss, _, targets = scored[content.segment == number].sum(0)
            answer = last_answer(content, number)
            right = answer is not None and bool(scored[answer.start : answer.stop, 1].all())
            sums[self.parts[_Part.of(source)]] += loss, targets, right, answer is not None
        return sums

    def summarize(self, sums: npt.NDArray[np.float64]) -> dict[str, float]:
        """Return the metrics of sums over all rows, float64[rows, parts, 4]; the order of rows does not matter."""
        total = np.array([[math.fsum(sums[:, at, kind]) for kind in range(_SUMS)] for at in range(len(self.parts))])
        corpora = {part.corpus for part in self.parts}
        families = {part.family for part in self.parts}
        found = {f"{self.name}/loss": _ratio(total, 0, 1)}
        for corpus in sorted(corpora):
            own = [at for part, at in self.parts.items() if part.corpus == corpus]
            found[f"{self.name}/loss/{corpus}"] = _ratio(total[own], 0, 1)
        if total[:, 3].sum():
            found[f"{self.name}/{ACCURACY}"] = _ratio(total, 2, 3)
        for family in sorted(families):
            own = [at for part, at in self.parts.items() if part.family == family]
            if total[own, 3].sum():
                found[f"{self.name}/{ACCURACY}/{family}"] = _ratio(total[own], 2, 3)
        return found


def _ratio(total: npt.NDArray[np.float64], over: int, under: int) -> float:
    count = math.fsum(total[:, under])
    return math.fsum(total[:, over]) / count if count else math.nan


class Evaluator:
    """Evaluates a run's stages on its held-out folders."""

    def __init__(self, plan: RunPlan, stage: Zero3Stage, runner: Runner, device: torch.device, *, threads: int) -> None:
        """Read which corpora and families the folders hold; ``threads`` decode images."""
        self._plan, self._stage, self._runner, self._device = plan, stage, runner, device
        self._threads = threads
        self._folders = [HeldOut(name, packs, plan.config.eval.samples) for name, packs in plan.held_out.items()]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics."""
        return [name for folder in self._folders for name in folder.metrics]

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after a step."""
        every = self._plan.config.eval.every_steps
        return bool(every) and (step % every == 0 or step == self._plan.steps)

    def run(self) -> tuple[dict[str, float], float]:
        """Return the metrics, the same on every rank, and the seconds it took. Collective."""
        began = time.monotonic()
        with self._stage.inference():
            sums = [self._sums(folder) for folder in self._folders]
        found: dict[str, float] = {}
        for folder, own in zip(self._folders, sums, strict=True):
            shared = torch.from_numpy(own).to(self._device)
            dist.all_reduce(shared)  # each row is counted by one rank: the sum is exact
            found |= folder.summarize(shared.cpu().numpy())
        return found, time.monotonic() - began

    def _sums(self, folder: HeldOut) -> npt.NDArray[np.float64]:
        """Return this rank's share of the sums, float64[rows, parts, 4]; 0 for rows of other ranks."""
        topology, own = self._plan.topology, np.zeros((folder.rows, len(folder.parts), _SUMS))
        groups = list(folder.groups(topology.dp, topology.dp_rank, self._plan.order.microbatches))
        source = self._source(folder)
        try:
            for rows, microbatches in zip(
                groups, source.rows([max(0, row) for row in rows] for rows in groups), strict=True
            ):
                for row, inputs, scores in self._scored(rows, microbatches):
                    own[row] = folder.sums(row, inputs, scores)
        finally:
            source.close()
        return own

    def _scored(
        self, rows: Sequence[int], microbatches: Sequence[StageInputs]
    ) -> Iterator[tuple[int, StageInputs, torch.Tensor]]:
        """Yield (row, micro-batch, scores) of the rows that this rank counts: none except on the last stage."""
        asked = [replace(inputs, per_token=True) for inputs in microbatches]
        for row, inputs, scores in zip(rows, asked, self._runner.evaluate(asked), strict=False):
            if row >= 0:
                yield row, inputs, scores

    def _source(self, folder: HeldOut) -> BatchSource:
        plan = self._plan
        return BatchSource(
            folder.packs, order=plan.order, dp_rank=plan.topology.dp_rank, policy=plan.policy,
            preprocess=[tower.preprocess for tower in plan.spec.towers.values()] if plan.topology.first else (),
            threads=self._threads, ahead=1,
        )  # fmt: skip
