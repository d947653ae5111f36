"""One start at a time in a run folder: rank 0 holds a lock on a file in it for as long as it lives.

The kernel frees the lock however the process ends, kill -9 included, so that nothing is left to clean up. Where a
network file system knows no locks, starts are not told apart, and a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError

LOCK = "lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
HERE_S, ELSEWHERE_S = 5.0, 120.0
"""How long a holder on this host, or on another, may take to go: a killed process, or the lease of a node that died."""


def hold(run_dir: Path) -> IO[str]:
    """Take the lock of a run folder; it is held while the returned file is open.

    Raises UserError naming the holder when another process keeps it.
    """
    try:  # not through a link, which may lead out of the folder
        stream = os.fdopen(os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise UserError(f"{run_dir / LOCK} cannot be opened ({error.strerror}): remove it") from error
    began, told = time.monotonic(), False
    while not _took(stream):
        other = holder(run_dir)
        here = other.get("host") == socket.gethostname()
        name = f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')}"
        if time.monotonic() - began > (HERE_S if here else ELSEWHERE_S):
            raise UserError(f"{run_dir} is being trained by {name}: stop it first, or choose another --run-dir")
        if not (here or told):
            print(f"{run_dir} is held by {name}: waiting up to {ELSEWHERE_S:.0f} s for it to go", flush=True)
            told = True
        time.sleep(0.2)
    stream.truncate(0)
    stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    stream.flush()
    os.fsync(stream.fileno())  # other nodes look for it
    return stream


def _took(stream: IO[str]) -> bool:
    """Try to take a lock; True as well where there are no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        print(f"warning: {stream.name} cannot be locked ({error.strerror}): start this run only once", flush=True)
    return True


def holder(run_dir: Path) -> dict[str, Any]:
    """Return ``{"host": ..., "pid": ...}`` of the last process that took the lock; empty when it is not known."""
    try:
        said = json.loads((run_dir / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def is_running(run_dir: Path | str) -> bool | None:
    """Whether a process holds a run folder; None where its file system cannot tell.

    A run whose status.json says "running" while this is False was killed.
    """
    try:
        descriptor = os.open(Path(run_dir) / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if error.errno in _TAKEN else None
    finally:
        os.close(descriptor)
