"""Decides when a run saves and prunes, and fills in the manifest."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.common.errors import UserError
from data_prep.text.template import template_of
from pipeline.checkpoints.checkpoint import prune, remove_unfinished, set_aside_unproven, step_of
from pipeline.checkpoints.manifest import CheckpointManifest
from pipeline.checkpoints.shards import shards
from pipeline.checkpoints.writing import DivergedError, HostCopy, Phase, Target, describe, gather_phase, save_phases
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.planning.run_plan import RunPlan
from pipeline.training.origin import FROM_SCRATCH, Origin
from pipeline.training.run.best import Best
from pipeline.training.run.folder import RunFolder


class CheckpointManager:
    """Writes a run's checkpoints from all ranks and removes old ones.

    With ``checkpoint.asynchronous``, training only waits while shards are copied to host memory; a thread of each rank
    writes them. Ranks learn that all threads are done from the step's all-reduce, so all of them start the next phase
    after the same step and no thread calls a collective. At most one save is in progress.
    """

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        stage: Zero3Stage,
        *,
        step: int,
        origin: Origin = FROM_SCRATCH,
        best: Best | None = None,
    ) -> None:
        """Save ``stage`` into ``folder``; ``step`` is that of its newest checkpoint (0 = none). Collective.

        ``origin`` has the base weights of a run with LoRA, which are not saved; ``best`` is the best evaluation so far,
        whose checkpoint is kept.
        """
        self._plan, self._folder, self._stage, self._origin = plan, folder, stage, origin
        self._is_rank0 = plan.topology.rank == 0
        self._place = folder.path / "checkpoints"
        self._newest, self._proven = step, step - 1
        self._unpruned: Path | None = None
        self._best = self._best_saved = best
        self._due = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host = HostCopy(stage, origin.stores) if plan.config.checkpoint.asynchronous else None
        self._phases: Generator[Phase, list[Any], None] | None = None  # remaining phases of the save in progress
        self._phase: Future[Any] = Future()
        self._waited = 0.0
        if self._is_rank0:
            remove_unfinished(folder.path)
            folder.set_best(best)
        gathered: list[Any] = [None] * plan.topology.world
        dist.all_gather_object(gathered, (describe(stage, origin.stores), uuid.uuid4().hex[:8]))
        self._params = {name: entry for params, _ in gathered for name, entry in params.items()}
        self._token: str = gathered[0][1]

    @property
    def newest(self) -> int:
        """Step of the newest published checkpoint; 0 = none."""
        return self._newest

    def after_step(self, step: int, *, healthy: bool, stop: bool, best: Best | None = None) -> None:
        """Save after a step if a save is due, on a stop, or where ``best`` is of this step. Collective.

        ``healthy``: the step was applied and all of its losses are finite, which proves the weights before it. After
        any other step nothing is saved; a save that is due waits for the next healthy step.

        ``best`` is the best evaluation so far. Its checkpoint replaces the former best one once it is published.
        """
        every = self._plan.config.checkpoint.every_steps
        self._best = best
        due_now = stop or bool(every and step % every == 0) or (best is not None and best.step == step)
        self._due |= due_now
        if healthy:
            self._proven = step - 1
            self._prune()
        if self._due and healthy:
            self.save(step)
        elif due_now and self._is_rank0:
            self._folder.record("checkpoint-unhealthy", step=step, reason="the step was skipped")

    def set_aside_unproven(self) -> list[Path]:
        """Rename checkpoints that no later step has proven, after the run has diverged; only rank 0 does."""
        return set_aside_unproven(self._folder.path, self._proven) if self._is_rank0 else []

    @property
    def pending(self) -> float:
        """This rank's term in the all-reduce: 1 while it writes, infinite once it has failed, else 0."""
        if self._phases is None or (self._phase.done() and self._phase.exception() is None):
            return 0.0
        return math.inf if self._phase.done() else 1.0

    def advance(self, pending: float) -> None:
        """Start the next phase of a save once every rank has finished the last one, or one has failed.

        ``pending`` is the sum over all ranks. Raises UserError on all ranks alike when one of them could not write.
        """
        if self._phases is not None and (pending == 0 or math.isinf(pending)):
            self._timed(self._next_phase)

    def save(self, step: int) -> None:
        """Begin to save, unless this step is saved already. Collective.

        Waits for the previous save, and for this one unless it is asynchronous. Raises UserError on all ranks alike
        when one of them cannot write; the unfinished checkpoint is removed.
        """
        self.finish()
        self._due = False
        if step != self._newest:
            self._timed(lambda: self._begin(step))
        if self._host is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress. Collective; raises UserError like `save`."""
        while self._phases is not None:
            self._timed(self._next_phase)

    def close(self, step: int, *, done: bool) -> None:
        """Save the last step of a start, and wait for it. Collective; raises UserError like `save`."""
        self.save(step)
        self.finish()
        if done:  # no later step will prove it
            self._proven = step
            self._prune()

    def take_waited(self) -> float:
        """Return the seconds that training waited for saves since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _timed(self, work: Phase) -> None:
        began = time.monotonic()
        work()
        self._waited += time.monotonic() - began

    def _begin(self, step: int) -> None:
        plan = self._plan
        own = self._host.take() if self._host else dict(shards(self._stage, self._origin.stores))
        self._step, self._target = step, Target(self._place / f"step-{step:08d}", self._token)
        tokenizer = plan.packs.directory / plan.packs.manifest.tokenizer
        self._phases = save_phases(
            own, self._target, self._manifest(step), rank=plan.topology.rank, tokenizer=tokenizer
        )
        self._phase = self._pool.submit(next(self._phases))

    def _next_phase(self) -> None:
        """End a phase on all ranks and begin the next."""
        assert self._phases is not None
        try:
            gathered = gather_phase(self._phase, self._target.final)
            self._phase = self._pool.submit(self._phases.send(gathered))
        except StopIteration:
            self._phases = None
            self._saved()
        except UserError as error:
            self._phases = None
            if self._is_rank0:
                shutil.rmtree(self._target.hidden, ignore_errors=True)
                if isinstance(error, DivergedError):
                    self._folder.record("checkpoint-unhealthy", step=self._step, reason="values are not finite")
            raise

    def _saved(self) -> None:
        self._newest = self._step
        if self._best is not None and self._best.step == self._step:
            self._best_saved = self._best
        if self._is_rank0:
            self._unpruned = self._target.final
            self._prune()
            self._folder.set_best(self._best_saved)
            self._folder.set_status("running", self._step)
            print(f"saved {self._target.final}", flush=True)

    def _prune(self) -> None:
        """Remove old checkpoints: after a save, and once more when a later step has proven it."""
        newest, kept = self._unpruned, self._plan.config.checkpoint
        if newest is not None:
            prune(
                self._folder.path, kept.keep_last, newest=newest, proven=self._proven, keep_every=kept.keep_every,
                best=self._best_saved.step if self._best_saved else None,
            )  # fmt: skip
            self._unpruned = newest if self._proven < step_of(newest) else None

    def _manifest(self, step: int) -> CheckpointManifest:
        plan = self._plan
        return CheckpointManifest(
            step=step, optimizer_steps=self._stage.optimizer_steps,
            consumed_packs=step * plan.order.global_batch_size,
            plan_sha256=plan.packs.manifest.plan_sha256, global_batch_size=plan.order.global_batch_size,
            pp=plan.topology.pp, dp=plan.topology.dp, config=plan.config.model_dump(),
            model=describe_model(plan), base=self._origin.base, params=self._params,
        )  # fmt: skip


def describe_model(plan: RunPlan) -> dict[str, object]:
    """Return the model's description, from which a checkpoint can be exported without the recipe."""
    manifest = plan.packs.manifest
    return {
        "spec": plan.spec.to_dict(),
        "policy": plan.config.mask.name,
        "template": asdict(template_of(manifest)),
        "image_id": manifest.image_id,
        "pad_id": manifest.pad_id,
        "eos_ids": list(manifest.eos_ids),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "dtype": plan.dtype_name,
    }
