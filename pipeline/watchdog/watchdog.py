"""The state that a rank's training thread, its signal handlers and its watchdog thread share."""

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
JOIN_S = 30.0
TERMINATED_CODE = 128 + signal.SIGTERM
BYE, FAILED = 200, 201  # distinct from signal numbers, which arrive through the same pipe


class Watchdog:
    """One rank's watchdog; the training loop updates its `heartbeat`."""

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
            place: ``stage 0, dp rank 1; host node-2, pid 4242``.
            timeout_s: The job has failed when no rank makes progress for this long.
            log: The rank's log file; Python stacks go there.
            report: Prints and records why the job ends; called on rank 0, from the watchdog's thread.
            lost: The same on the other ranks, with a text and the step, when rank 0 has died or hangs.
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
        """Start the watchdog's thread, which runs `Coordinator.run` on rank 0 and `Worker.run` on the others.

        SIGUSR2 writes the stacks to the log, even while C code holds Python's lock.
        """
        self._catch_signals()
        faulthandler.enable(self._log)
        faulthandler.register(signal.SIGUSR2, self._log, all_threads=True)
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="watchdog", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a failing watchdog must never end a job
            self.warn(
                f"the watchdog of rank {self.rank} has failed ({type(error).__name__}: {error}); "
                "training continues without it"
            )
        finally:
            faulthandler.cancel_dump_traceback_later()

    def warn(self, text: str) -> None:
        """Print a warning."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @property
    def alive(self) -> bool:
        """Whether this rank is watched."""
        return self._thread is not None and self._thread.is_alive()

    def fail(self, error: str, code: int) -> bool:
        """Report this rank's error to rank 0 and wait until all ranks know; return False where that is impossible."""
        if not self.alive:
            return False
        self.failure = (error, code)
        self._command(FAILED)
        assert self._thread is not None
        self._thread.join(JOIN_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Say goodbye to the other ranks: this one is done."""
        if self._thread is not None:
            self._command(BYE)
            self._thread.join(JOIN_S)
        self._release_signals()

    def _command(self, number: int) -> None:
        self._wake_in.send(bytes([number]))

    def commands(self) -> list[int]:
        """Return the commands of the training thread, and signals, since the last call."""
        try:
            return list(self.wake_out.recv(64))
        except BlockingIOError:
            return []

    def _catch_signals(self) -> None:
        """Handle SIGTERM in the watchdog's thread: launchers send it to the siblings of a rank that died.

        The report of that death may still be in the socket, and the training thread may be unable to run a handler.
        """
        if threading.current_thread() is threading.main_thread():
            old = signal.signal(signal.SIGTERM, _ignore)
            self._old_signals = old, signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)

    def _release_signals(self) -> None:
        if self._old_signals is not None:
            signal.signal(signal.SIGTERM, self._old_signals[0])
            signal.set_wakeup_fd(self._old_signals[1])
            self._old_signals = None

    def next_heartbeat(self) -> dict[str, Any]:
        """Return this rank's heartbeat; the stacks are written if no next one is sent in time."""
        faulthandler.dump_traceback_later(self.timeout_s + 15, file=self._log)
        return self.heartbeat.message()

    def leave(self, text: str, code: int, *, stacks: bool) -> None:
        """End this process from the watchdog's thread, unless its training thread is ending by itself."""
        if self.failure is not None:
            return
        self._log.write(f"{text}\n")
        self._log.flush()
        if stacks:
            faulthandler.dump_traceback(self._log, all_threads=True)
        os._exit(code)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the watchdog's thread handles the signal."""
