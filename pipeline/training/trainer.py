"""The training loop of one run, on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from data_prep.common.errors import UserError, did_you_mean
from pipeline.checkpoints import checkpoint
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.writing import DivergedError
from pipeline.data.batches import BatchSource, StepBatch, default_threads
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import device_of_rank, share_of_cores
from pipeline.parallel.runner import Runner
from pipeline.parallel.traffic import StepTraffic
from pipeline.parallel.zero3 import StepResult
from pipeline.planning.changes import settings_changed
from pipeline.planning.run_plan import RunPlan
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.engine import build_engine
from pipeline.training.evaluation import Evaluator
from pipeline.training.incidents import Incidents, Outcome
from pipeline.training.lr_schedule import learning_rate
from pipeline.training.metrics import (
    Console,
    MetricsFile,
    StepStats,
    forget_events_from,
    monitor_events,
    peak_flops,
    samples_digest,
)
from pipeline.training.origin import Origin, find_origin
from pipeline.training.run.best import Best, evaluations_up_to
from pipeline.training.run.folder import RunFolder, State
from pipeline.training.start_events import record_source_events
from pipeline.training.supervise import collective_limit
from pipeline.training.tracing import StepTimer, memory_line
from pipeline.watchdog.heartbeat import Heartbeat


@dataclass(frozen=True)
class _Totals:
    """Sums over all ranks of one step."""

    losses: tuple[float, ...]
    """Summed token loss of every micro-batch, in order of rows."""
    tokens: int
    images: int
    media_tokens: int
    stop: bool
    saving: float
    """See `CheckpointManager.advance`."""


class Trainer:
    """Owns this rank's stage, its data and the state of the run (one integer: steps done)."""

    def __init__(self, plan: RunPlan, folder: RunFolder, heartbeat: Heartbeat) -> None:
        """Build the stage; load the newest intact checkpoint or the initial weights."""
        self._plan, self._folder, self._heartbeat = plan, folder, heartbeat
        self._device = device_of_rank()
        self._is_rank0 = plan.topology.rank == 0
        heartbeat.report("creating process groups")
        limit_s = collective_limit(plan.config.parallel.timeout_s)
        groups = create_groups(plan.topology, limit_s, ring=len(plan.virtual_stages) > 1)
        origin = find_origin(plan, folder.path, self._report_damage)
        if self._is_rank0 and origin.own is None and origin.source is not None:
            record_source_events(origin.source, folder)
        self._stage = build_engine(
            plan, groups, self._device, heartbeat, source=origin.source, empty=origin.is_checkpoint
        )
        self._runner = Runner(
            self._stage, topology=plan.topology, groups=groups, width=plan.spec.width, dtype=plan.dtype,
            schedule=plan.config.parallel.schedule, virtual_stages=plan.virtual_stages,
            progress_callback=heartbeat.report,
        )  # fmt: skip
        threads = plan.config.data.decode_threads
        self._decode_threads = default_threads(share_of_cores()) if threads is None else threads
        self._timer = StepTimer(plan, folder, self._runner.recorder, self._device)
        self._peak = peak_flops(self._device)
        heartbeat.report("loading a checkpoint")
        self.step = self._load(origin)
        self._evaluator = Evaluator(plan, self._stage, self._runner, self._device, threads=self._decode_threads)
        self._best = self._best_before()
        self._checkpoints = CheckpointManager(
            plan, folder, self._stage, step=self.step, origin=origin, best=self._best
        )  # fmt: skip
        self._incidents = Incidents(plan, folder, step=self.step)

    def _best_before(self) -> Best | None:
        """Return the best evaluation of earlier starts, the same on every rank. Raises UserError for a wrong metric."""
        metric = self._plan.config.checkpoint.best
        if not metric:
            return None
        if metric not in (known := self._evaluator.metrics):
            raise UserError(
                f"checkpoint.best={metric} is not measured{did_you_mean(metric, known)}: {', '.join(known)}"
            )
        found = [Best.of(metric, evaluations_up_to(self._folder.path / "metrics.jsonl", self.step))]
        dist.broadcast_object_list(found)
        return found[0]

    def _say(self, text: str) -> None:
        if self._is_rank0:
            print(text, flush=True)

    def _report_damage(self, fault: str) -> None:
        self._say(f"skipping a damaged checkpoint: {fault}")
        if self._is_rank0:
            self._folder.record("checkpoint-damaged", reason=fault)

    def _load(self, origin: Origin) -> int:
        """Fill the stage from checkpoints, if there are any; return the step of the run."""
        own = origin.own
        if origin.given is not None:
            checkpoint.load(self._stage, origin.given, weights_only=True)
        if own is not None:
            checkpoint.load(self._stage, own)
            self.step = own.manifest.step
            self._say(f"resuming from {own.path} ({self.place})")
            self._report_changes(own)
            return own.manifest.step
        if self._plan.config.init_from:
            self._say(f"starting from the weights of {self._plan.config.init_from}")
        return 0

    def _report_changes(self, own: Checkpoint) -> None:
        """Print and record every setting that differs from the checkpoint."""
        plan = self._plan
        if not self._is_rank0:
            return
        changes = settings_changed(
            own.manifest, plan.config, plan_sha256=plan.packs.manifest.plan_sha256, dtype=plan.dtype_name
        )
        for change in changes:
            print(f"  changed since: {change}{' (changes the result)' if change.changes_result else ''}", flush=True)
            self._folder.record(
                "setting-changed" if change.changes_result else "setting-adjusted",
                step=self.step, key=change.key, old=change.old, new=change.new,
            )  # fmt: skip

    @property
    def place(self) -> str:
        """Return the step of the run, in words."""
        step, steps = self.step, self._plan.steps
        return f"step {step}/{steps}" if step <= steps else f"step {step}, beyond train.steps={steps}"

    def fit(self) -> State:
        """Train to the last step or until a stop is requested; save; return how it ended."""
        plan, config = self._plan, self._plan.config
        metrics = MetricsFile(self._folder.path / "metrics.jsonl", resume_step=self.step) if self._is_rank0 else None
        if metrics is not None:
            self._folder.record("metrics-damaged", metrics.damaged)
        console = Console(steps=plan.steps, first=self.step, every=config.log.every_steps, world=plan.topology.world)
        forget_events_from(self.step + 1, self._stage.engine.monitor)
        state: State = "done"
        began = time.monotonic()
        for batch, data_s in self._batches():
            stats, stop = self._train_step(batch, data_s, began)
            if self._evaluator.is_due(self.step):
                stats = self._evaluate(stats)
            if metrics is not None:
                metrics.write(stats)
                console.show(stats)
                if config.log.tensorboard or config.log.wandb:
                    self._stage.engine.monitor.write_events(monitor_events(stats))
            stop = stop and self.step < plan.steps
            self._heartbeat.report("saving")
            self._checkpoints.after_step(self.step, healthy=self._incidents.healthy, stop=stop, best=self._best)
            if stop:
                state = "stopped"
                break
        self._heartbeat.report("saving")
        self._close(state)
        if metrics is not None:
            metrics.close()
        if self._device.type == "cuda":
            self._say(memory_line(plan, self._device))
        return state

    def _evaluate(self, stats: StepStats) -> StepStats:
        """Add the held-out metrics; note the best evaluation, unless the step was not healthy. Collective."""
        self._heartbeat.report("evaluating")
        found, eval_s = self._evaluator.run()
        if self._incidents.healthy and self._plan.config.checkpoint.best:
            self._best = Best.after(self._best, self._plan.config.checkpoint.best, self.step, found)
        return replace(stats, eval=found, eval_s=eval_s)

    def _close(self, state: State) -> None:
        """Save the last step. Raises DivergedError where it was skipped: the run is neither done nor saved then."""
        if self._incidents.healthy:
            self._checkpoints.close(self.step, done=state == "done")
            return
        self._checkpoints.finish()
        if state == "done":
            skipped = self._incidents.skipped
            last = f"the last {skipped} steps, up to {self.step}, were" if skipped > 1 else f"step {self.step} was"
            raise self._diverged(
                DivergedError(
                    f"{last} skipped, so nothing shows that the weights are good: lower train.lr, or end the run "
                    "before them (--train.steps)"
                )
            )
        self._say(f"step {self.step} was skipped and is not saved: the next start resumes from an earlier one")
        self.step = self._checkpoints.newest

    def _batches(self) -> Iterator[tuple[StepBatch, float]]:
        """Yield each step's batch and the seconds spent waiting for it."""
        plan = self._plan
        source = BatchSource(
            plan.packs, order=plan.order, dp_rank=plan.topology.dp_rank, policy=plan.policy,
            preprocess=[tower.preprocess for tower in plan.spec.towers.values()] if plan.topology.first else (),
            threads=self._decode_threads, ahead=plan.config.data.prefetch_steps, draft=plan.config.data.draft_jpeg,
        )  # fmt: skip
        steps = source.steps(self.step, plan.steps)
        try:
            while True:
                began = time.monotonic()
                self._heartbeat.report("reading rows")
                batch = next(steps, None)
                if batch is None:
                    return
                yield batch, time.monotonic() - began
        finally:
            source.close()

    def _train_step(self, batch: StepBatch, data_s: float, run_began: float) -> tuple[StepStats, bool]:
        began = time.monotonic()
        self._heartbeat.begin_step(self.step + 1)
        rate = learning_rate(self._plan.config.train, self.step, self._plan.steps)
        scale = self._plan.topology.dp / max(1, batch.targets)
        self._timer.begin(self.step + 1, data_s)
        losses = self._runner.run(batch.microbatches, scale)
        with self._runner.recorder.span("optimizer", "optimizer step"):
            result = self._stage.step(rate)
        self.step += 1
        self._heartbeat.report("summing the step's totals")
        totals = self._sum_over_ranks(losses, batch, self._wants_stop(run_began))
        self._check(Outcome(self.step, result, batch, totals.losses))
        stats = self._stats(batch, result, totals, rate, data_s, data_s + time.monotonic() - began)
        self._checkpoints.advance(totals.saving)
        return stats, totals.stop

    def _check(self, outcome: Outcome) -> None:
        """Check for incidents; if too many end the run, on all ranks alike, finish a save in progress first."""
        try:
            self._incidents.check(outcome)
        except DivergedError as error:
            self._heartbeat.report("saving")
            with suppress(UserError):  # the incident matters more
                self._checkpoints.finish()
            raise self._diverged(error) from None

    def _diverged(self, error: DivergedError) -> DivergedError:
        """Set unproven checkpoints aside; return the error with what became of them."""
        aside = [folder.name for folder in self._checkpoints.set_aside_unproven()]
        more = f"; no later step proves {', '.join(aside)}, now diverged-{aside[-1]}" if aside else ""
        return DivergedError(f"{error}{more}")

    def _wants_stop(self, run_began: float) -> bool:
        limit = self._plan.config.train.max_hours
        late = bool(limit) and time.monotonic() - run_began > 3600 * limit
        return self._is_rank0 and (late or self._folder.stop_asked())

    def _sum_over_ranks(self, losses: torch.Tensor, batch: StepBatch, stop: bool) -> _Totals:
        """Sum the step's totals over ranks, and pass rank 0's request to stop to all of them at the same step."""
        topology, count = self._plan.topology, len(losses)
        shown = (batch.tokens, batch.images, batch.media_tokens) if topology.first else (0, 0, 0)
        own = [*shown, float(stop), self._checkpoints.pending]
        sums = torch.zeros(len(own) + topology.dp * count, dtype=torch.float64)
        sums[: len(own)] = torch.tensor(own, dtype=torch.float64)
        sums = sums.to(losses.device)
        start = len(own) + topology.dp_rank * count
        sums[start : start + count] = losses
        self._heartbeat.report("waiting for all ranks: the step's totals")  # on GPUs, this also waits for the device
        dist.all_reduce(sums)
        tokens, images, media_tokens, stops, saving, *every_loss = sums.tolist()
        self._heartbeat.report("recording the step")
        return _Totals(tuple(every_loss), int(tokens), int(images), int(media_tokens), stops > 0, saving)

    def _stats(
        self, batch: StepBatch, result: StepResult, totals: _Totals, rate: float, data_s: float, step_s: float
    ) -> StepStats:
        per_second = totals.tokens / step_s
        mfu = memory = None
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        if self._peak is not None:
            flops = self._plan.split.counts.step_flops(
                tokens=totals.tokens, targets=batch.targets, images=self._plan.spec.views(totals.media_tokens)
            )
            mfu = flops / step_s / (self._peak * self._plan.topology.world)
        norm = result.grad_norm if result.applied else None
        return StepStats(
            step=self.step, loss=sum(totals.losses) / max(1, batch.targets), lr=rate, grad_norm=norm,
            lr_of={label: rate * scale for label, scale in self._plan.split.scales.items()},
            applied=result.applied, targets=batch.targets, tokens=totals.tokens, images=totals.images,
            consumed_packs=self.step * self._plan.order.global_batch_size,
            step_s=step_s, data_s=data_s, tokens_per_s=per_second, mfu=mfu,
            memory_gib=memory, traffic=self._traffic(), save_s=self._checkpoints.take_waited(),
            bubble=self._timer.end(), expected_bubble=self._timer.expected,
            samples=samples_digest(self._plan.packs, batch.rows) if self._is_rank0 else "",
        )  # fmt: skip

    def _traffic(self) -> StepTraffic | None:
        """Return this rank's traffic since the previous step."""
        plan = self._plan
        if not plan.config.log.traffic:
            return None
        trained, frozen = plan.split.parameters(plan.topology.stage)
        return StepTraffic.of(self._stage.traffic.take(), trained=trained, frozen=frozen, size=plan.dtype.itemsize)
