"""A lock on a folder: its holder locks a file in it, and the kernel releases the lock however the holder ends.

Nothing needs cleaning up after kill -9. On a network file system without locks, work continues with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.common.errors import UserError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
HERE_S, ELSEWHERE_S = 5.0, 120.0
"""Seconds to wait for a dead holder's lock: a killed process on this host, or the lease of a dead node elsewhere."""


@dataclass(frozen=True, slots=True)
class FolderLock:
    """The lock of one folder."""

    path: Path
    """The lock file inside the folder."""
    busy: str
    """Error message when another process holds the lock; ``{folder}`` and ``{holder}`` are filled in."""
    once: str
    """Advice printed on file systems without locks."""

    def hold(
        self,
        say: Callable[[str], None],
        *,
        shared: bool = False,
        wait: bool = False,
        unlocked: Callable[[], None] = lambda: None,
    ) -> IO[str]:
        """Take the lock; it is held while the returned file is open.

        Args:
            say: gets a line when a holder is waited for, and where the file system knows no locks.
            shared: beside others that hold it shared.
            wait: until its holder is done, however long; else only as long as one that was killed takes to go.
            unlocked: called where the file system knows no locks.

        Raises:
            UserError: another process holds the lock, or the file cannot be opened.
            OSError: the folder does not exist and cannot be created.
        """
        stream = self._open()
        began, announced = time.monotonic(), False
        while not self._try_lock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, say, unlocked):
            other = self.holder()
            here = other.get("host") == socket.gethostname()
            name = f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')}"
            patience = math.inf if wait else HERE_S if here else ELSEWHERE_S
            if time.monotonic() - began > patience:
                raise UserError(self.busy.format(folder=self.path.parent, holder=name))
            if not announced and (wait or not here):
                limit = "" if wait else f" up to {ELSEWHERE_S:.0f} s"
                say(f"{self.path.parent} is locked by {name}: waiting{limit}")
                announced = True
            time.sleep(0.2)
        stream.truncate(0)
        stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # makes the holder's name visible on other nodes
        return stream

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:  # never follow a link, which may lead out of the folder
            return os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror}): remove it") from error

    def _try_lock(self, stream: IO[str], kind: int, say: Callable[[str], None], unlocked: Callable[[], None]) -> bool:
        """Try to take a lock; True as well where there are no locks."""
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            say(f"warning: {self.path} cannot be locked ({error.strerror}): {self.once}")
            unlocked()
        return True

    def holder(self) -> dict[str, Any]:
        """Return ``{"host": ..., "pid": ...}`` of the last holder; empty if unknown."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_held(self) -> bool | None:
        """Return whether a process holds the lock; None if the file system cannot tell."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError as error:
            return True if error.errno in _TAKEN else None
        finally:
            os.close(descriptor)
