"""The state of a run, read from its folder without heavy libraries."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from pipeline.training.run.folder import RunFolder, lock_of, read_json_object

_HUGE = 1e18


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
    last: dict[str, float]
    """The numbers in the last line of metrics.jsonl; damaged values are left out."""
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
            raise UserError(
                f"{path} is not a run folder (no readable status.json): give the --run-dir of a started run"
            )
        metrics = path / "metrics.jsonl"
        last = {key: value for key, value in read_json_object(metrics, last_line=True).items() if _is_number(value)}
        written = max(file.stat().st_mtime for file in (metrics, path / "status.json") if file.is_file())
        checkpoints = sorted((path / "checkpoints").glob("step-*"))
        return cls(
            path=path, state=_state(path, str(status.get("state"))), last=last, error=str(status.get("error", "")),
            step=max(_count(last.get("step")), _count(status.get("step"))), steps=_count(status.get("steps")),
            age_s=max(0.0, time.time() - written), checkpoint=checkpoints[-1] if checkpoints else None,
        )  # fmt: skip


def _state(path: Path, said: str) -> str:
    if said != "running":
        return said
    return {True: "running", False: "killed", None: "running?"}[lock_of(path).is_held()]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _HUGE)


def _count(value: Any) -> int:
    """Return a number as a count; 0 for anything that is none, such as nan."""
    return int(value) if _is_number(value) and abs(value) < _HUGE else 0


def format_duration(seconds: float) -> str:
    """Return a duration as ``42s``, ``3m07s`` or ``5h12m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
