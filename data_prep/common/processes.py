"""Worker processes that end with their parent, however the parent ends.

Two independent mechanisms, because each has a gap. Linux's parent-death signal (``prctl(PR_SET_PDEATHSIG)``) needs no
thread, but does not exist elsewhere. A pipe whose other end only the parent holds reads end-of-file when the parent is
gone, on every system.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes that end with this one, even if it is killed by SIGKILL.

    "spawn" starts clean interpreters: forking would copy the caller's open files and threads. Ctrl-C reaches every
    process of the terminal; workers die of it silently, and the parent reports it.
    """
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with held, watched, ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(), watched)) as pool:
        yield pool


def _begin_worker(parent: int, watched: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent(parent)
    threading.Thread(target=_wait_for_end, args=(watched,), daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent (process id ``parent``) ends; exit if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait_for_end(watched: Connection) -> None:
    """Exit when the other end of the pipe is closed. Nothing is ever sent through it."""
    watched.poll(None)
    os._exit(1)
