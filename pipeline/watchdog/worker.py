"""The watchdog's thread on every rank but 0: sends heartbeats, ends the process on request, and watches rank 0."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.watchdog.channel import Channel
from pipeline.watchdog.monitor import SETTLE_S, SILENT_S, TERMINATED, Member, progress_limit, silence
from pipeline.watchdog.watchdog import BYE, FAILED, HEARTBEAT_S, TERMINATED_CODE, Watchdog

CONNECT_S = 20.0
YIELD_S = 4.0
"""Rank 1 has this long to name a silent rank 0 before the others, whose exit makes the launcher end all ranks."""
STACKS_S = 0.5
"""A hung rank 0 gets this long to write its stacks before it is killed."""


class Worker:
    """The thread of any other rank."""

    def __init__(self, watch: Watchdog, address: tuple[str, int], secret: int) -> None:
        self._watch, self._address, self._secret = watch, address, secret
        self._rank0 = Member(0, "coordinator", heard=time.monotonic())
        self._last = self._rank0.heard

    def run(self) -> None:
        """Report this rank's activity until it is done, is told to stop, or rank 0 dies or hangs."""
        watch = self._watch
        try:
            connection = socket.create_connection(self._address, timeout=CONNECT_S)
        except OSError as error:
            host, port = self._address
            text = f"rank {watch.rank} cannot reach the watchdog of rank 0 at {host}:{port} ({error})"
            watch.warn(f"{text}: if this rank hangs, only the timeout of collectives will end the job")
            return
        connection.settimeout(None)
        channel = Channel(connection)
        channel.send(secret=self._secret, rank=watch.rank, place=watch.place)
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(watch.wake_out, selectors.EVENT_READ)
            self._last = self._rank0.heard = time.monotonic()
            while self._iterate(selector, channel):
                pass
        connection.close()

    def _iterate(self, selector: selectors.BaseSelector, channel: Channel) -> bool:
        """Wait for a message or the next heartbeat; return False at the end."""
        watch = self._watch
        ready = {key.fileobj for key, _ in selector.select(HEARTBEAT_S)}
        commands = watch.commands()
        if signal.SIGTERM in commands:  # its reason may be about to arrive: see Watchdog._catch_signals
            ready |= {key.fileobj for key, _ in selector.select(1.0)}
        if channel.socket in ready and not self._receive(channel):
            return False
        if self._rank0_is_silent(time.monotonic()):
            self._end_silent_rank0()
            return False
        if FAILED in commands and watch.failure is not None:
            channel.send(**watch.next_heartbeat())  # the step it failed at
            channel.send(failed=watch.failure[0], code=watch.failure[1])
        elif BYE in commands:
            channel.send(bye=True)
            return False
        elif signal.SIGTERM in commands:
            channel.send(failed=TERMINATED, code=TERMINATED_CODE)
            watch.leave(TERMINATED, TERMINATED_CODE, stacks=True)
        else:
            channel.send(**watch.next_heartbeat())
        return True

    def _receive(self, channel: Channel) -> bool:
        """Handle what rank 0 sent; return False when nothing more will come."""
        messages = channel.receive()
        if messages is None:
            time.sleep(SETTLE_S)  # the same kill may end this rank, too; then it has nothing to report
            now = time.monotonic()
            hung = now - self._rank0.heard > SILENT_S + SETTLE_S  # killed because it hung
            self._end(silence(self._rank0, now) if hung else f"{self._rank0} died: killed, or out of host memory")
            return False
        for message in messages:
            if "stop" in message:
                self._watch.leave(str(message["stop"]), int(message["code"]), stacks=bool(message["stacks"]))
            if "stop" in message or "bye" in message:
                return False
            self._record(message)
        return True

    def _record(self, message: dict[str, Any]) -> None:
        """Record what rank 0 said of itself."""
        rank0, heartbeat = self._rank0, message.get("heartbeat", {})
        rank0.heard = time.monotonic()
        rank0.place = str(message.get("place", rank0.place))
        rank0.activity = str(heartbeat.get("activity", rank0.activity))
        rank0.where = str(heartbeat.get("where", rank0.where))

    def _rank0_is_silent(self, now: float) -> bool:
        """Whether rank 0 has sent nothing for too long; time in which this process was suspended does not count."""
        self._rank0.heard += max(0.0, now - self._last - 2 * HEARTBEAT_S)
        self._last = now
        limit = progress_limit(max(self._watch.timeout_s, SILENT_S), self._watch.heartbeat.begun)
        return now - self._rank0.heard > limit + (0 if self._watch.rank == 1 else YIELD_S)

    def _end_silent_rank0(self) -> None:
        """Kill a rank 0 that hangs, if it runs on this host; report it and end this process."""
        text = f"{silence(self._rank0, time.monotonic())} (parallel.timeout_s={self._watch.timeout_s:g})"
        self._end(f"no heartbeat of rank 0: {text}", kill=True)

    def _end(self, text: str, *, kill: bool = False) -> None:
        watch = self._watch
        text = f"{text}; this rank was in {watch.heartbeat.activity}"
        try:
            if kill and watch.rank == 1:  # before the report: it may not resume, and overwrite the status, in between
                kill_hung(self._rank0.place, watch.place)
            watch.lost(text, watch.heartbeat.step)
        finally:  # the job ends even if the report fails
            watch.leave(text, 1, stacks=True)


def kill_hung(theirs: str, ours: str) -> None:
    """Kill a rank of this host that a launcher could not end by SIGTERM, after it has written its stacks.

    A place ends in ``host NAME, pid NUMBER``. A stopped process is killed at once: its stacks tell nothing. Nothing is
    killed that was not started by the command of this process: hosts of containers may share a name.
    """
    (host, pid), (own_host, _) = (place.rpartition("host ")[2].rpartition(", pid ")[::2] for place in (theirs, ours))
    if host != own_host or not pid.isdecimal():
        return
    with suppress(OSError):
        if _command(pid) != _command("self"):
            return
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
        if state not in "tT":
            os.kill(int(pid), signal.SIGUSR2)  # see Watchdog.start
            time.sleep(STACKS_S)
        os.kill(int(pid), signal.SIGKILL)


def _command(pid: str) -> list[str]:
    """Return the command line of a process, without the argument in which the ranks of a node differ."""
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
