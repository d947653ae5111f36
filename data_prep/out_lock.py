"""One writer at a time in an output folder: a lock on a file in it, which the kernel frees however its holder ends.

Shares of one step (``--shard``) write different files, and hold it together. Where a network file system knows no
locks, writers are not told apart, and a line says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def hold(out: Path, say: Callable[[str], None], *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder, which is made where there is none, while the block runs.

    Args:
        out: the folder.
        say: gets a line where the file system knows no locks.
        shared: beside others that hold it shared.
        wait: until its holder is done.

    Raises:
        UserError: naming the holder, when another process keeps it and ``wait`` is not asked for.
        OSError: the folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as stream:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(stream, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = stream.read().strip() or "unknown"
                raise UserError(f"{out} is being written by another mma-prep ({holder}): wait for it") from None
            say(f"warning: {out / LOCK} cannot be locked ({error.strerror}): start one mma-prep at a time there")
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
