"""Metrics of a run: a line per step in metrics.jsonl, a console line every few steps, TensorBoard events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomic
from data_prep.packs import PackReader
from pipeline.parallel.traffic import StepTraffic
from pipeline.planning.hardware import known_peak
from pipeline.training.run.state import format_duration


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak FLOP/s, or None if it is unknown (no MFU then)."""
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class StepStats:
    """One line of metrics.jsonl; totals are over all ranks."""

    step: int
    """1-based number of the step."""
    loss: float
    """Mean cross-entropy per supervised token of the global batch, in nats; null in the file when not finite."""
    lr: float
    grad_norm: float | None
    """Before clipping; None when it was not finite."""
    applied: bool
    """False when the update was skipped because the gradient was not finite."""
    targets: int
    tokens: int
    images: int
    consumed_packs: int
    step_s: float
    data_s: float
    """Part of step_s that rank 0 spent waiting for data."""
    tokens_per_s: float
    mfu: float | None
    memory_gib: float | None
    """Peak device memory of this process; None on CPUs."""
    lr_of: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each part that trains (vision, connector, llm) and of each pattern of train.lr_of."""
    samples: str = ""
    """Digest of the step's samples, in order: equal in two runs exactly if the samples are (see `samples_digest`)."""
    save_s: float = 0.0
    """Seconds since the previous step that training waited for a checkpoint; not part of step_s."""
    eval: Mapping[str, float | None] | None = None
    """Held-out metrics after the step, where `eval.every_steps` asks for them: ``val/loss`` is the mean cross-entropy
    per supervised token in nats, ``val/teacher_forced_accuracy`` the share of answers in 0..1, both also by corpus or
    family; null in the file when not finite."""
    eval_s: float = 0.0
    """Seconds of the evaluation; not part of step_s."""
    traffic: StepTraffic | None = None
    """Of rank 0; None unless log.traffic is set."""
    bubble: float | None = None
    """Measured idle share of the pipelined part of the step (see `measured_bubble`); None with one stage, and unless
    log.traffic or log.trace_step is set."""
    expected_bubble: float | None = None
    """The idle share expected from the stages' FLOPs; None with one stage."""


class MetricsFile:
    """metrics.jsonl: appended and flushed per line; on resume, steps after the checkpoint are removed."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open for appending after ``resume_step``."""
        self.damaged = 0
        """Lines of earlier starts that could not be read, and were removed."""
        if path.is_file():
            found = path.read_bytes().splitlines(keepends=True)
            lines = [line for line in found if _step_of(line) <= resume_step]
            self.damaged = sum(math.isinf(_step_of(line)) for line in found)
            write_atomic(path, b"".join(lines))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, stats: StepStats) -> None:
        """Append one step. Raises UserError when the disk is full."""
        line = _finite(asdict(stats))
        line["eval"] = line["eval"] and _finite(line["eval"])
        try:
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")  # JSON knows no NaN
            self._stream.flush()
        except OSError as error:
            raise UserError(
                f"{self._stream.name} cannot be written ({error.strerror}): fix that and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def samples_digest(packs: PackReader, rows: range) -> str:
    """Return the xxh3-64 in hex of corpus, sample id and draw of every segment of the rows, in order."""
    digest = xxhash.xxh3_64()
    for row in rows:
        for source in packs.sources(row):
            digest.update(json.dumps([source.dataset, source.sample, source.draw]).encode())
    return digest.hexdigest()


def forget_events_from(step: int, monitor: Any) -> None:
    """Make TensorBoard drop events of ``step`` and later, written by a killed start after its last save."""
    writer = monitor.tb_monitor.summary_writer if monitor.tb_monitor else None
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def recent_losses(path: Path, step: int, count: int) -> list[float]:
    """Return up to ``count`` losses of a metrics file up to a step; non-finite ones are dropped."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    losses = [json.loads(line).get("loss") for line in lines if _step_of(line) <= step]
    return [float(loss) for loss in losses if type(loss) in (int, float)][-count:]


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(value, float) and not math.isfinite(value) else value for k, value in line.items()}


def _step_of(line: bytes) -> float:
    """Return a line's step; infinity for a line that is damaged, such as one torn by a crash."""
    try:
        step = json.loads(line)["step"]
        return float(step) if type(step) in (int, float) else math.inf
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
        return math.inf


class Console:
    """Prints progress on rank 0: a line every few steps, with the time left."""

    def __init__(self, *, steps: int, first: int, every: int, world: int) -> None:
        """Count from step ``first`` to ``steps``."""
        self._steps, self._first, self._every, self._world = steps, first, every, world
        self._began = time.monotonic()
        self._since: list[StepStats] = []

    def show(self, stats: StepStats) -> None:
        """Print a line if one is due at this step; values are means since the last one."""
        self._since.append(stats)
        if not (stats.step % self._every and stats.step != self._steps and stats.step != self._first + 1):
            print(self._line(), flush=True)
            self._since.clear()
        if stats.eval:
            print(eval_line(stats.step, stats.eval, stats.eval_s), flush=True)

    def _line(self) -> str:
        now, count = self._since[-1], len(self._since)
        seconds = sum(s.step_s for s in self._since)
        rate = sum(s.tokens for s in self._since) / seconds / self._world
        parts = [
            f"step {now.step}/{self._steps}",
            f"loss {sum(s.loss for s in self._since) / count:.4f}",
            f"lr {now.lr:.1e}",
            f"grad {now.grad_norm:.2f}" if now.grad_norm is not None else "grad not finite",
            f"tok/s/rank {rate:,.0f}",
        ]
        if now.mfu is not None:
            parts.append(f"mfu {100 * sum(s.mfu or 0.0 for s in self._since) / count:.1f}%")
        parts.append(f"data {100 * sum(s.data_s for s in self._since) / seconds:.1f}%")
        if now.memory_gib is not None:
            parts.append(f"mem {now.memory_gib:.1f} GiB")
        skipped = sum(not s.applied for s in self._since)
        parts += [f"SKIPPED {skipped}"] if skipped else []
        return "  ".join([*parts, f"eta {self._eta(now.step)}"])

    def _eta(self, step: int) -> str:
        done = step - self._first
        left = (time.monotonic() - self._began) / done * (self._steps - step) if done else 0.0
        return format_duration(left)


def eval_line(step: int, found: Mapping[str, float | None], seconds: float) -> str:
    """Return the totals of an evaluation in one line; metrics by corpus and family are in metrics.jsonl."""
    shown = [f"{name} {value:.4f}" for name, value in found.items() if value is not None and name.count("/") == 1]
    return "  ".join([f"eval {step}", *shown, f"in {format_duration(seconds)}"])


def monitor_events(stats: StepStats) -> list[tuple[str, Any, int]]:
    """Return a step's events for DeepSpeed's monitor."""
    shown: dict[str, float | None] = {
        "loss": stats.loss,
        "lr": stats.lr,
        "grad_norm": stats.grad_norm,
        "tokens_per_s": stats.tokens_per_s,
        "mfu": stats.mfu,
    }
    shown |= {f"lr/{label}": rate for label, rate in stats.lr_of.items()} if len(set(stats.lr_of.values())) > 1 else {}
    shown = {f"train/{name}": value for name, value in shown.items()}
    shown |= {f"eval/{name}": value for name, value in (stats.eval or {}).items()}
    return [(name, value, stats.step) for name, value in shown.items() if value is not None]
