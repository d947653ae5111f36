"""One rank's part in the watchdog: what its training thread, its signals and the watchdog's own thread share."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import IO, Any

from pipeline.watchdog.heartbeat import Heartbeat
from pipeline.watchdog.monitor import Diagnosis

HEARTBEAT_S = 1.0
PATIENCE_S = 30.0
TERMINATED_CODE = 128 + signal.SIGTERM
BYE, FAILED = 200, 201  # beside numbers of signals, which come through the same pipe


class Watchdog:
    """One rank's part in the watchdog; `doing` and `step` are what the training loop tells it."""

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        place: str,
        timeout_s: float,
        log: IO[str],
        report: Callable[[Diagnosis], None],
        lost: Callable[[str, int], None],
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            rank: This rank.
            world: Number of ranks.
            place: Where it is, in words.
            timeout_s: Without any progress of any rank for so long, the job has failed.
            log: The rank's log file; Python stacks go there.
            report: Says and records why the job ends; called on rank 0, from the watchdog's thread.
            lost: The same on the other ranks when rank 0 is gone; told the text and the step.
        """
        self.heartbeat = Heartbeat()
        self.rank, self.world, self.place, self.timeout_s = rank, world, place, timeout_s
        self._log, self.report, self.lost = log, report, lost
        self._wake_in, self.wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self.wake_out.setblocking(False)
        self._thread: threading.Thread | None = None
        self.failure: tuple[str, int] | None = None
        self._old_signals: tuple[Any, int] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin to watch: ``work`` is what `Coordinator`, on rank 0, or `Worker` runs in the watchdog's thread."""
        self._catch_signals()
        faulthandler.enable(self._log)
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="watchdog", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the watchdog must never be what ends a job
            self.warn(f"the watchdog of rank {self.rank} has ended ({type(error).__name__}: {error}); training goes on")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def warn(self, text: str) -> None:
        """Say and log a warning."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @property
    def alive(self) -> bool:
        """Whether this rank is watched."""
        return self._thread is not None and self._thread.is_alive()

    def fail(self, error: str, code: int) -> bool:
        """Tell rank 0 of this rank's own error and wait until all ranks know; return False where nobody listens."""
        if not self.alive:
            return False
        self.failure = (error, code)
        self._command(FAILED)
        assert self._thread is not None
        self._thread.join(PATIENCE_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Take leave of the other ranks: this one is done."""
        if self._thread is not None:
            self._command(BYE)
            self._thread.join(PATIENCE_S)
        self._release_signals()

    def _command(self, number: int) -> None:
        self._wake_in.send(bytes([number]))

    def commands(self) -> list[int]:
        """Return what the training thread, or a signal, has asked of the watchdog's thread."""
        try:
            return list(self.wake_out.recv(64))
        except BlockingIOError:
            return []

    def _catch_signals(self) -> None:
        """Let the watchdog's thread hear SIGTERM, with which launchers end the siblings of a rank that died.

        The news of that death may be in the socket still, and the training thread may not get to any handler.
        """
        if threading.current_thread() is threading.main_thread():
            old = signal.signal(signal.SIGTERM, _pass)
            self._old_signals = old, signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)

    def _release_signals(self) -> None:
        if self._old_signals is not None:
            signal.signal(signal.SIGTERM, self._old_signals[0])
            signal.set_wakeup_fd(self._old_signals[1])
            self._old_signals = None

    def next_heartbeat(self) -> dict[str, Any]:
        """Return this rank's pulse, and see to it that the stacks are written even if no thread gets to run again."""
        faulthandler.dump_traceback_later(self.timeout_s + 15, file=self._log)
        return self.heartbeat.message()

    def leave(self, text: str, code: int, *, stacks: bool) -> None:
        """End this process from the watchdog's thread, unless its training thread ends by itself."""
        if self.failure is not None:
            return
        self._log.write(f"{text}\n")
        self._log.flush()
        if stacks:
            faulthandler.dump_traceback(self._log, all_threads=True)
        os._exit(code)


def _pass(number: int, frame: FrameType | None) -> None:
    """Leave a signal to the watchdog's thread."""
