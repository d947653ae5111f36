"""Processor time of the trainer beside a plain torch loop, on the model and the batches of the built-in demo.

Run from the repository root: ``OMP_NUM_THREADS=1 python -m benchmarks.host``. The trainer runs as users run it: ZeRO-3,
clipping, metrics, watchdog, loader threads. After each of its steps, the plain loop takes the same batch through the
same model: forward, backward, `clip_grad_norm_`, AdamW; nothing else. Both must reach the same losses. Times are of the
processor, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from data_prep.demo.packs import Demo, ensure_demo
from pipeline.config.flags import parse as parse_flags
from pipeline.data.batches import StepBatch
from pipeline.model.build import build_stage
from pipeline.parallel.launch import configure_libraries, fill_rank_variables, start_processes, stop_processes
from pipeline.planning.run_plan import RunPlan
from pipeline.training.lr_schedule import learning_rate
from pipeline.training.metrics import StepStats
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.logs import RankLog
from pipeline.training.supervise import watch_ranks
from pipeline.training.trainer import Trainer
from pipeline.watchdog.heartbeat import Heartbeat

_LINEAR = F.linear  # DeepSpeed may replace it in this process; the plain loop uses torch's own
WARM_UP = 5
"""Steps before the clocks start: the first ones allocate, and record DeepSpeed's trace."""
TOLERANCE = 1e-4
"""Relative difference of losses after tens of steps; both loops round differently where they clip and sum norms."""
COLUMNS = ("recipe", "tokens a step", "plain ms", "trainer ms", "trainer / plain", "loop / plain", "rows / plain")


class PlainLoop:
    """The least that a step can cost: forward, backward, clipping and AdamW in plain torch."""

    def __init__(self, plan: RunPlan) -> None:
        """Build the model with the weights that the trainer starts from."""
        self._plan, train, spec = plan, plan.config.train, plan.spec
        self._stage = build_stage(
            spec, layers=range(spec.layers), first=True, last=True, dtype=plan.dtype, device="cpu", seed=train.seed,
            trains=plan.split.trainable.trains, gradient_checkpointing=train.recomputed_layers,
        )  # fmt: skip
        self._params = [param for param in self._stage.parameters() if param.requires_grad]
        groups = [
            {"params": [p for p in self._params if (p.dim() > 1) == matrices], "weight_decay": decay}
            for matrices, decay in ((True, train.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps)

    def step(self, batch: StepBatch, number: int) -> float:
        """Take step ``number``, counted from 0; return the mean loss per supervised token."""
        with mock.patch.object(F, "linear", _LINEAR):
            return self._step(batch, number)

    def _step(self, batch: StepBatch, number: int) -> float:
        train, total = self._plan.config.train, 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(train, number, self._plan.steps)
        for inputs in batch.microbatches:
            loss = self._stage(None, inputs) * (1 / batch.targets)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._params, train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


@dataclass
class Clocks:
    """Processor seconds by thread, and the losses of the two loops."""

    plain: float = 0.0
    main: float = 0.0
    """The trainer's main thread; its loader threads are the rest of the process."""
    process_began: float = 0.0
    process_ended: float = 0.0
    tokens: list[int] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)

    @property
    def trainer(self) -> float:
        """All threads of the process, without the plain loop."""
        return self.process_ended - self.process_began - self.plain


class SideBySide(Trainer):
    """The real trainer, which after each step hands its batch to the plain loop."""

    def __init__(self, plan: RunPlan, folder: RunFolder, heartbeat: Heartbeat) -> None:
        super().__init__(plan, folder, heartbeat)
        self._plain, self.clocks, self._resumed = PlainLoop(plan), Clocks(), 0.0

    def _train_step(self, batch: StepBatch, data_s: float, run_began: float) -> tuple[StepStats, bool]:
        stats, stop = super()._train_step(batch, data_s, run_began)
        began = time.thread_time()
        loss = self._plain.step(batch, self.step - 1)
        ended, clocks = time.thread_time(), self.clocks
        if self.step > WARM_UP:
            clocks.plain += ended - began
            clocks.main += began - self._resumed
            clocks.process_ended = time.process_time()
            clocks.tokens.append(stats.tokens)
        else:
            clocks.process_began = time.process_time()
        clocks.losses.append((stats.loss, loss))
        self._resumed = ended
        return stats, stop


def measure(recipe: str, packs: Path, run: Path, steps: int, more: list[str]) -> Clocks:
    """Train a recipe for ``WARM_UP + steps`` steps, both ways."""
    words = ["--recipe", recipe, "--run-dir", str(run), "--data.packs", str(packs), "--checkpoint.every-steps", "0"]
    words += ["--train.epochs", "0", "--train.steps", str(WARM_UP + steps), *more]
    plan = RunPlan.build(parse_flags(words), rank=0, world=1)
    folder = RunFolder(plan.config.run_dir)
    folder.create()
    folder.claim()
    folder.record_start(plan.config, world=1, steps=plan.steps)
    watch = watch_ranks(plan.topology, folder, RankLog(folder, 0), 600)
    trainer = SideBySide(plan, folder, watch.heartbeat)
    trainer.fit()
    watch.close()
    worst = max(abs(ours / plain - 1) for ours, plain in trainer.clocks.losses)
    if worst > TOLERANCE:
        raise SystemExit(f"wrong: {recipe}: the losses of trainer and plain loop differ by {worst:.1e}")
    return trainer.clocks


def table_line(recipe: str, clocks: Clocks) -> str:
    """Return a result as a row of the Markdown table."""
    steps, plain = len(clocks.tokens), clocks.plain
    shares = clocks.trainer / plain, clocks.main / plain, (clocks.trainer - clocks.main) / plain
    cells = [
        recipe,
        f"{sum(clocks.tokens) / steps:,.0f}",
        *(f"{1000 * t / steps:.1f}" for t in (plain, clocks.trainer)),
    ]
    return f"| {' | '.join(cells)} | **{shares[0]:.2f}** | {shares[1]:.2f} | {shares[2]:.2f} |"


def main(argv: list[str] | None = None) -> None:
    """Draw the demo's world unless given, measure its two recipes, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["demo_pt", "demo_sft"], help="default: demo_pt demo_sft")
    parser.add_argument("--demo", type=Path, default=None, help="demo folder; default: one drawn for this run")
    parser.add_argument("--steps", type=int, default=40, help="measured steps (default: 40)")
    options, more = parser.parse_known_args(argv)
    configure_libraries()
    fill_rank_variables()
    start_processes(600)
    with tempfile.TemporaryDirectory(prefix="host-cost-") as temporary:
        demo = options.demo or Path(temporary) / "demo"
        ensure_demo(demo, Demo(scenes=1500, held_out=12))
        lines = [
            table_line(recipe, measure(recipe, demo / "packs" / recipe.split("_")[1], Path(temporary) / recipe,
                                       options.steps, more))
            for recipe in options.recipes
        ]  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", *lines, sep="\n", flush=True)
    stop_processes()


if __name__ == "__main__":
    main()
