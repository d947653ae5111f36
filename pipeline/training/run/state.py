"""The state of a run, read from its folder without heavy libraries."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS_FILE, EventLedger
from pipeline.training.run.folder import RunFolder, is_regular, lock_of, read_regular

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
    events: dict[str, int] = field(default_factory=dict)
    """Counts of its events by code, most frequent first."""

    @classmethod
    def read(cls, path: Path | str) -> RunState:
        """Read a run folder. Raises UserError if it is not one."""
        path = Path(path)
        status = RunFolder(str(path)).status()
        if not status:
            what = "status.json is damaged" if os.path.lexists(path / "status.json") else "no status.json"
            raise UserError(f"{path} is not a run folder ({what}): give the --run-dir of a started run")
        metrics = path / "metrics.jsonl"
        last = _last_line(metrics)
        written = max(file.lstat().st_mtime for file in (metrics, path / "status.json") if is_regular(file))
        checkpoints = checkpoint_folders_of(path)
        return cls(
            path=path, state=_state(path, _one_line(status.get("state", "unknown"))), last=last,
            error=_one_line(status.get("error", "")),
            step=max(int(last.get("step", 0)), status.get("step", 0)), steps=status.get("steps", 0),
            age_s=max(0.0, time.time() - written), checkpoint=checkpoints[-1] if checkpoints else None,
            events=_events_of(path),
        )  # fmt: skip


def _state(path: Path, said: str) -> str:
    if said != "running":
        return said
    return {True: "running", False: "killed", None: "running?"}[lock_of(path).is_held()]


def _last_line(path: Path) -> dict[str, Any]:
    """Return the numbers of the last complete line of a JSON-lines file; empty if there is none."""
    try:
        complete = read_regular(path, _TAIL).rpartition(b"\n")[0]
        line = json.loads(complete.rpartition(b"\n")[2])
    except (OSError, ValueError, RecursionError):
        return {}
    entries = line.items() if isinstance(line, dict) else ()
    return {key: value for key, value in entries if _is_number(value)}


def _one_line(text: str) -> str:
    """Return a text of someone else's file without line ends, escapes and half characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63


def checkpoint_folders_of(path: Path) -> list[Path]:
    """Return the published checkpoint folders of a run, oldest first."""
    try:
        return sorted(folder for folder in (path / "checkpoints").glob("step-*") if not folder.is_symlink())
    except OSError:
        return []


def _events_of(path: Path) -> dict[str, int]:
    """Return the counts of a run's events; a ledger that is a link, a pipe or a device is not read."""
    ledger = path / EVENTS_FILE
    return EventLedger(ledger).summary() if is_regular(ledger) else {}


def format_duration(seconds: float) -> str:
    """Return a duration as ``42s``, ``3m07s`` or ``5h12m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
