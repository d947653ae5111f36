"""The state of a run, read from its folder without heavy libraries."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from pipeline.training.run.folder import RunFolder, lock_of

_TAIL = 1 << 16


@dataclass(frozen=True)
class RunState:
    """A run, as seen in its folder."""

    path: Path
    state: str
    """running, done, stopped, failed, killed (its lock is free), or "running?" on a file system without locks."""
    step: int
    """The last step trained."""
    steps: int
    """Steps of the whole run; 0 = unknown."""
    error: str
    """Why it failed."""
    last: dict[str, Any]
    """The last line of metrics.jsonl."""
    age_s: float
    """Seconds since the folder was last written."""
    checkpoint: Path | None
    """The newest published one, intact or not."""

    @classmethod
    def read(cls, path: Path | str) -> RunState:
        """Read a run folder. Raises UserError if it is not one."""
        path = Path(path)
        status = RunFolder(str(path)).status()
        if not status:
            raise UserError(f"{path} is not a run folder (no status.json): give the --run-dir of a started run")
        metrics = path / "metrics.jsonl"
        last = _last_line(metrics)
        written = max(file.stat().st_mtime for file in (metrics, path / "status.json") if file.is_file())
        checkpoints = sorted((path / "checkpoints").glob("step-*"))
        return cls(
            path=path, state=_state(path, str(status.get("state"))), last=last, error=str(status.get("error", "")),
            step=max(last.get("step", 0), status.get("step", 0)), steps=status.get("steps", 0),
            age_s=max(0.0, time.time() - written), checkpoint=checkpoints[-1] if checkpoints else None,
        )  # fmt: skip


def _state(path: Path, said: str) -> str:
    if said != "running":
        return said
    return {True: "running", False: "killed", None: "running?"}[lock_of(path).is_held()]


def _last_line(path: Path) -> dict[str, Any]:
    """Return the last complete line of a JSON-lines file; empty if there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            whole = stream.read().rpartition(b"\n")[0]
        return dict(json.loads(whole.rpartition(b"\n")[2]))
    except (OSError, ValueError):
        return {}


def format_duration(seconds: float) -> str:
    """Return a duration as ``42s``, ``3m07s`` or ``5h12m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
