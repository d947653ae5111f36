"""The run folder: what is in it, who writes what, and how a run is stopped.

runs/NAME/config.yaml     the resolved configuration of the last start
runs/NAME/env.json        versions, ranks, git commit of the last start
runs/NAME/status.json     {"state": "running" | "done" | "stopped" | "failed", "step": n, ...}; "step" is the last one
                          saved while running, and a run that was killed says "running" too
runs/NAME/metrics.jsonl   one line a step
runs/NAME/incidents.jsonl steps that went wrong, see `pipeline.training.incidents`
runs/NAME/checkpoints/    see `pipeline.training.checkpoint`
runs/NAME/STOP            made by the user or the batch script: end after this step, saved
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.packs import write_atomic
from pipeline.config import RunConfig
from pipeline.recipe import to_yaml

State = Literal["running", "done", "stopped", "failed"]
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "pyarrow", "numpy")


class RunFolder:
    """One run's folder; rank 0 writes it, every rank may look, and say that it failed."""

    def __init__(self, path: str) -> None:
        """Name the folder; nothing is made yet."""
        self.path = Path(path)
        self.stop_file = self.path / "STOP"

    def create(self) -> None:
        """Make the folder, on every rank alike. Raises UserError when it cannot be written."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                return
        except OSError as error:
            raise UserError(
                f"run_dir {self.path} cannot be written ({error.strerror}): choose another --run-dir"
            ) from error

    def record_start(self, config: RunConfig, *, world: int) -> None:
        """Write config.yaml, env.json and the status of a start; rank 0 only."""
        write_atomic(self.path / "config.yaml", to_yaml(config).encode())
        write_atomic(self.path / "env.json", (json.dumps(environment(world), indent=1) + "\n").encode())
        self.set_status("running", self.status().get("step", 0))

    def set_status(self, state: State, step: int, **more: Any) -> None:
        """Write status.json."""
        status = {"state": state, "step": step, "time": timestamp(), **more}
        write_atomic(self.path / "status.json", (json.dumps(status) + "\n").encode())

    def set_failed(self, error: BaseException, step: int | None = None) -> None:
        """Record a failure, on whichever rank it is met; what the first one says stays."""
        before = self.status()
        if before.get("state") != "failed":
            step = before.get("step", 0) if step is None else step
            self.set_status("failed", step, error=str(error) or type(error).__name__)

    def status(self) -> dict[str, Any]:
        """Return status.json, or an empty dictionary before the first start."""
        try:
            return dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def add_incident(self, **incident: Any) -> None:
        """Add a line to incidents.jsonl."""
        with (self.path / "incidents.jsonl").open("a", encoding="utf-8") as stream:
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


def environment(world: int) -> dict[str, Any]:
    """Return versions and the place of the run; no environment variable is copied, so no secret can be."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "ranks": world,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
