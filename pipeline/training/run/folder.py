"""The run folder: its files, and how a run is stopped.

runs/NAME/config.yaml     the resolved configuration of the last start
runs/NAME/env.json        versions, ranks, git state and environment of the last start
runs/NAME/status.json     {"state": "running" | "done" | "stopped" | "failed", "step": n, "steps": of how many, ...};
                          while running, "step" is the last one saved; a killed run keeps saying "running"
                          a failed run has "error", and "reason": "diverged" if it diverged
runs/NAME/metrics.jsonl   one line a step
runs/NAME/events.jsonl    skipped steps, changed settings, damaged files, failures: see `data_prep.common.events`
runs/NAME/logs/           rank-N.log: warnings, errors with tracebacks and, after a hang, stacks of that rank
runs/NAME/checkpoints/    see `pipeline.checkpoints.checkpoint`
runs/NAME/best.json       {"metric", "value", "step", "checkpoint"} of the best checkpoint, see ``checkpoint.best``
runs/NAME/lock            held while the run trains, see `lock_of`
runs/NAME/STOP            created by the user or the batch script: save and end after this step
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS_FILE, EventLedger, describe_events
from data_prep.common.files import write_atomic
from data_prep.common.folder_lock import FolderLock
from pipeline.config.recipes import to_yaml
from pipeline.config.schema import RunConfig
from pipeline.training.run.best import Best
from pipeline.training.run.environment import environment
from pipeline.training.run.redact import redact

State = Literal["running", "done", "stopped", "failed"]
DIVERGED = "diverged"
"""``reason`` of a failed run whose weights or losses were not finite: the same command would fail again."""


class RunFolder:
    """One run's folder. Rank 0 writes it; every rank may read it and record a failure."""

    def __init__(self, path: str, strict: frozenset[str] = frozenset()) -> None:
        """Refer to a folder; nothing is created yet. ``strict`` are the codes of events that end the run."""
        self.path = Path(path)
        self.events = EventLedger(self.path / EVENTS_FILE, strict)
        self.stop_file = self.path / "STOP"
        self.start = 0
        """Random number of this start of the run, the same on all ranks (see `watch_ranks`)."""
        self.reason = ""
        """Why the run fails, for programs, written with a failure: `DIVERGED` or nothing."""
        self._steps = 0
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Create the folder, on every rank. Raises UserError when it is not writable or contains links."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                odd = [path for path in self.path.iterdir() if not path.is_dir() and not is_regular(path)]
        except OSError as error:
            raise UserError(
                f"run_dir {self.path} cannot be written ({error.strerror}): choose another --run-dir"
            ) from error
        if odd:
            what = (
                "a symbolic link, which a run does not write through" if odd[0].is_symlink() else "not a regular file"
            )
            raise UserError(f"{odd[0]} is {what}: remove it, or replace it by the file")

    def claim(self) -> None:
        """Lock the folder for the life of this process; rank 0 only. Raises UserError naming the holder."""
        self._lock = lock_of(self.path).hold(partial(print, flush=True))

    def record_start(self, config: RunConfig, *, world: int, steps: int = 0) -> None:
        """Write config.yaml, env.json and status.json at a start; rank 0 only. Raises UserError if the disk is full."""
        self._steps = steps
        self._write("config.yaml", to_yaml(config))
        self._write("env.json", json.dumps(environment(world), indent=1) + "\n")
        self.set_status("running", self.status().get("step", 0))

    def set_status(self, state: State, step: int, **more: Any) -> None:
        """Write status.json. Raises UserError if the disk is full."""
        where = {"state": state, "step": step, "steps": self._steps}
        status = {**where, "time": timestamp(), "start": self.start, **more}
        self._write("status.json", json.dumps(status) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomic(self.path / name, text.encode())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): fix that and run the same command again"
            ) from error

    def set_best(self, best: Best | None) -> None:
        """Write best.json, or remove it. Raises UserError if the disk is full."""
        if best is None:
            (self.path / "best.json").unlink(missing_ok=True)
            return
        checkpoint = f"checkpoints/step-{best.step:08d}"
        self._write("best.json", json.dumps({**asdict(best), "checkpoint": checkpoint}) + "\n")

    def set_failed(self, error: BaseException | str, step: int | None = None) -> None:
        """Record a failure, from any rank; the first one stays.

        A process left over from an earlier start does not change the status of a later one.
        """
        before, text = self.status(), redact(str(error) or type(error).__name__)
        own = before.get("start", self.start) == self.start
        if before.get("state") == "failed" if own else self._lock is None:
            return
        self._steps = before.get("steps", 0)
        why = {"error": text, **({"reason": self.reason} if self.reason else {})}
        with suppress(UserError):  # the disk may be full; the failure itself matters more
            self.set_status("failed", before.get("step", 0) if step is None else step, **why)

    def status(self) -> dict[str, Any]:
        """Return status.json; an empty dictionary before the first start, or if the file is damaged."""
        try:
            return typed_status(json.loads(read_regular(self.path / "status.json")))
        except (OSError, ValueError, RecursionError):
            return {}

    def log_path(self, rank: int) -> Path:
        """Return the log file of a rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def record(self, code: str, count: int = 1, **detail: Any) -> None:
        """Append an event to events.jsonl, if the disk has room. Raises StrictEvent if ``--strict`` makes it fatal."""
        with suppress(OSError):
            self.events.record(code, count, **detail)

    def event_lines(self) -> list[str]:
        """Return a line with the events of this start, or none if there are none."""
        counts = describe_events(self.events.recorded)
        return [f"events   {counts}: see {self.events.path}"] if counts else []

    def stop_asked(self) -> bool:
        """Whether the STOP file exists."""
        return self.stop_file.exists()

    def clear_stop(self) -> None:
        """Remove the STOP file, so the same command resumes."""
        self.stop_file.unlink(missing_ok=True)


def is_regular(path: Path) -> bool:
    """Whether a path is a regular file: no link, which may lead out of the folder, and no pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_regular(path: Path, last_bytes: int = 1 << 20) -> bytes:
    """Return the end of a regular file, up to so many bytes. Raises OSError, also for links, pipes and devices."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        stream.seek(max(0, os.fstat(descriptor).st_size - last_bytes))
        return stream.read(last_bytes)


def typed_status(raw: object) -> dict[str, Any]:
    """Return the entries of a status whose types are right: others may have written the file."""
    types: dict[str, type | tuple[type, ...]] = {"state": str, "error": str, "reason": str, "time": str}
    types |= {"step": int, "steps": int, "start": int}
    entries = raw.items() if isinstance(raw, dict) else ()
    return {
        key: value
        for key, value in entries
        if isinstance(value, types.get(key, ())) and not (isinstance(value, int) and not 0 <= value < 1 << 63)
    }


def timestamp() -> str:
    """Return the current time in the format of run folders."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def lock_of(run_dir: Path | str) -> FolderLock:
    """Return the lock of a run folder. If status.json says "running" but nobody holds the lock, the run was killed."""
    return FolderLock(
        Path(run_dir) / "lock",
        busy="{folder} is being trained by {holder}: stop it first, or choose another --run-dir",
        once="start this run only once",
    )
