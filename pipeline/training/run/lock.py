"""One start at a time in a run folder: rank 0 holds a lock on it for as long as it lives."""

from __future__ import annotations

from pathlib import Path

from data_prep.folder_lock import FolderLock


def lock_of(run_dir: Path | str) -> FolderLock:
    """Return the lock of a run folder. A run whose status.json says "running" while it is not held was killed."""
    return FolderLock(
        Path(run_dir) / "lock",
        busy="{folder} is being trained by {holder}: stop it first, or choose another --run-dir",
        once="start this run only once",
    )
