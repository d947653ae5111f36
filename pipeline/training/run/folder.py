"""The run folder: what is in it, who writes what, and how a run is stopped.

runs/NAME/config.yaml     the resolved configuration of the last start
runs/NAME/env.json        versions, ranks, git state and what of the environment matters, of the last start
runs/NAME/status.json     {"state": "running" | "done" | "stopped" | "failed", "step": n, "steps": of how many, ...};
                          "step" is the last one saved while running, and a run that was killed says "running" too
runs/NAME/metrics.jsonl   one line a step
runs/NAME/incidents.jsonl steps that went wrong, see `pipeline.training.incidents`
runs/NAME/logs/           rank-N.log: that rank's warnings, errors with tracebacks, stacks when it hung
runs/NAME/checkpoints/    see `pipeline.checkpoints.checkpoint`
runs/NAME/lock            held while the run is trained, see `pipeline.training.run.folder`
runs/NAME/STOP            made by the user or the batch script: end after this step, saved
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomic
from data_prep.common.folder_lock import FolderLock
from pipeline.config.recipes import to_yaml
from pipeline.config.schema import RunConfig
from pipeline.training.run.environment import environment
from pipeline.training.run.redact import redact

State = Literal["running", "done", "stopped", "failed"]


class RunFolder:
    """One run's folder; rank 0 writes it, every rank may look, and say that it failed."""

    def __init__(self, path: str) -> None:
        """Name the folder; nothing is made yet."""
        self.path = Path(path)
        self.stop_file = self.path / "STOP"
        self.start = 0
        """A number that every start of a run draws; the same on all ranks, once they have met."""
        self._steps = 0
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Make the folder, on every rank alike. Raises UserError when it cannot be written, or leads elsewhere."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                links = [path for path in self.path.iterdir() if path.is_symlink() and not path.is_dir()]
        except OSError as error:
            raise UserError(
                f"run_dir {self.path} cannot be written ({error.strerror}): choose another --run-dir"
            ) from error
        if links:
            raise UserError(f"{links[0]} is a symbolic link, which is not written through: put the file in its place")

    def claim(self) -> None:
        """Keep other starts out for the life of this process; rank 0 only. Raises UserError naming who has it."""
        self._lock = lock_of(self.path).hold(partial(print, flush=True))

    def record_start(self, config: RunConfig, *, world: int, steps: int = 0) -> None:
        """Write config.yaml, env.json and the status of a start of a run of so many steps; rank 0 only.

        Raises UserError where the disk is full.
        """
        self._steps = steps
        self._write("config.yaml", to_yaml(config))
        self._write("env.json", json.dumps(environment(world), indent=1) + "\n")
        self.set_status("running", self.status().get("step", 0))

    def set_status(self, state: State, step: int, **more: Any) -> None:
        """Write status.json. Raises UserError where the disk is full."""
        where = {"state": state, "step": step, "steps": self._steps}
        status = {**where, "time": timestamp(), "start": self.start, **more}
        self._write("status.json", json.dumps(status) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomic(self.path / name, text.encode())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): mend that, then start again") from error

    def set_failed(self, error: BaseException | str, step: int | None = None) -> None:
        """Record a failure, on whichever rank it is met; what the first one says stays.

        A rank that its start left behind leaves the status of a later one alone.
        """
        before, text = self.status(), redact(str(error) or type(error).__name__)
        own = before.get("start", self.start) == self.start
        if before.get("state") == "failed" if own else self._lock is None:
            return
        self._steps = before.get("steps", 0)
        with suppress(UserError):  # on a full disk there is no telling, and the failure itself matters more
            self.set_status("failed", before.get("step", 0) if step is None else step, error=text)

    def status(self) -> dict[str, Any]:
        """Return status.json, or an empty dictionary before the first start."""
        try:
            return dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def log_path(self, rank: int) -> Path:
        """Return where a rank writes what it has to say for itself."""
        return self.path / "logs" / f"rank-{rank}.log"

    def add_incident(self, **incident: Any) -> None:
        """Add a line to incidents.jsonl, where the disk takes it."""
        with suppress(OSError), (self.path / "incidents.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": timestamp(), **incident}, allow_nan=False) + "\n")

    def stop_asked(self) -> bool:
        """Whether a STOP file is there."""
        return self.stop_file.exists()

    def clear_stop(self) -> None:
        """Remove the STOP file once it is honoured, so that the same command resumes."""
        self.stop_file.unlink(missing_ok=True)


def timestamp() -> str:
    """Return the time of day, as run folders write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def lock_of(run_dir: Path | str) -> FolderLock:
    """Return the lock of a run folder. A run whose status.json says "running" while it is not held was killed."""
    return FolderLock(
        Path(run_dir) / "lock",
        busy="{folder} is being trained by {holder}: stop it first, or choose another --run-dir",
        once="start this run only once",
    )
