"""A lock on a folder: a file in it that its holder keeps locked, and that the kernel frees however the holder ends.

Nothing is left to clean up after kill -9. Where a network file system knows no locks, holders are not told apart, and a
line says so.
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
"""How long a holder on this host, or on another, may take to go: a killed process, or the lease of a node that died."""


@dataclass(frozen=True, slots=True)
class FolderLock:
    """The lock of one folder."""

    path: Path
    """The file, in the folder."""
    busy: str
    """What is said when another process keeps it: ``{folder}`` and ``{holder}`` are filled in."""
    once: str
    """What to do where there are no locks."""

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
            UserError: another process keeps it, or the file cannot be opened.
            OSError: the folder is not there and cannot be made.
        """
        stream = self._open()
        began, told = time.monotonic(), False
        while not self._took(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, say, unlocked):
            other = self.holder()
            here = other.get("host") == socket.gethostname()
            name = f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')}"
            patience = math.inf if wait else HERE_S if here else ELSEWHERE_S
            if time.monotonic() - began > patience:
                raise UserError(self.busy.format(folder=self.path.parent, holder=name))
            if not told and (wait or not here):
                limit = "" if wait else f" up to {ELSEWHERE_S:.0f} s"
                say(f"{self.path.parent} is held by {name}: waiting{limit} for it to go")
                told = True
            time.sleep(0.2)
        stream.truncate(0)
        stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # other nodes look for it
        return stream

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:  # not through a link, which may lead out of the folder
            return os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror}): remove it") from error

    def _took(self, stream: IO[str], kind: int, say: Callable[[str], None], unlocked: Callable[[], None]) -> bool:
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
        """Return ``{"host": ..., "pid": ...}`` of the last process that took the lock; empty when it is not known."""
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def is_held(self) -> bool | None:
        """Whether a process holds the lock; None where the file system cannot tell."""
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
