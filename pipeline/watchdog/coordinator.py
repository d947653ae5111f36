"""The watchdog's thread on rank 0: receives the heartbeats of all ranks and decides when the job has failed."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from typing import Any

from pipeline.watchdog.channel import Channel
from pipeline.watchdog.monitor import SETTLE_S, SILENT_S, TERMINATED, Monitor
from pipeline.watchdog.watchdog import BYE, FAILED, HEARTBEAT_S, TERMINATED_CODE, Watchdog

SUSPENDED_S = 30.0
"""One iteration of the loop takes a second. If it took this long, the job was suspended, so the time does not count."""


class Coordinator:
    """Rank 0's thread."""

    def __init__(self, watch: Watchdog, listener: socket.socket, secret: int) -> None:
        self._watch, self._listener, self._secret = watch, listener, secret
        self._monitor = Monitor(watch.world, watch.timeout_s)
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, Channel] = {}

    def run(self) -> None:
        """Watch until this rank is done or the job has failed."""
        try:
            self._run()
        except Exception:
            self._send_all(bye=True)  # without a goodbye, the other ranks would treat the lost connection as a death
            raise

    def _run(self) -> None:
        watch, monitor = self._watch, self._monitor
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(watch.wake_out, selectors.EVENT_READ)
        last = last_heartbeat = time.monotonic()
        monitor.join(0, watch.place, last)
        while True:
            events = self._selector.select(SETTLE_S / 2 if monitor.troubled else HEARTBEAT_S)
            now = time.monotonic()
            if now - last > SUSPENDED_S:
                monitor.extend_deadline(now - last)
            last = now
            commands = self._serve(events, now)
            if commands or now - last_heartbeat >= HEARTBEAT_S:
                self._beat(now)
                last_heartbeat = now
            elif not monitor.troubled:
                continue
            if self._decide(commands, now):
                return

    def _beat(self, now: float) -> None:
        """Record this rank's heartbeat and send it to the others, which watch rank 0 by it.

        A rank that has been silent gets none: it may be stopped, and a full socket would block this thread.
        """
        heartbeat = self._watch.next_heartbeat()
        self._monitor.record(0, heartbeat, now)
        for rank, channel in self._channels.items():
            if now - self._monitor.members[rank].heard < SILENT_S:
                channel.send(heartbeat=heartbeat)

    def _decide(self, commands: list[int], now: float) -> bool:
        """End the job if it has failed, or leave it if this rank is done; return whether watching is over."""
        watch, monitor = self._watch, self._monitor
        terminated = signal.SIGTERM in commands
        if FAILED in commands and watch.failure is not None:
            monitor.failed(0, *watch.failure, now)
        diagnosis = monitor.diagnosis(now, terminated=terminated)
        if diagnosis is not None:
            stacks = diagnosis.kind != "error"
            self._send_all(stop=diagnosis.text, code=diagnosis.code, stacks=stacks)
            try:
                watch.report(diagnosis)
            finally:  # the job ends even if the report fails
                watch.leave(diagnosis.text, diagnosis.code, stacks=stacks)
        elif BYE in commands:
            self._send_all(bye=True)
        elif terminated:
            self._send_all(stop=TERMINATED, code=TERMINATED_CODE, stacks=True)
            watch.leave(TERMINATED, TERMINATED_CODE, stacks=True)
        else:
            return False
        return True

    def _serve(self, events: list[tuple[selectors.SelectorKey, int]], now: float) -> list[int]:
        """Read what has arrived; return the commands of the training thread and signals."""
        for key, _ in events:
            if key.data is not None:
                key.data(now)
        commands = self._watch.commands()
        if signal.SIGTERM in commands:  # the event that caused it may already be in a socket
            for key, _ in self._selector.select(0.2):
                if key.data is not None:
                    key.data(now)
        return commands

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._listener.accept()
            channel = Channel(connection)
        except OSError:  # already closed
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Connection(self, channel))

    def admit(self, channel: Channel, message: dict[str, Any], now: float) -> int | None:
        """Start to watch a rank that sent the secret; return its number, or None for a stranger."""
        if message.get("secret") != self._secret:
            return None
        rank = int(message["rank"])
        self._channels[rank] = channel
        self._monitor.join(rank, str(message["place"]), now)
        channel.socket.setblocking(True)  # sends are short; `receive` is only called when data has arrived
        channel.send(place=self._watch.place)
        return rank

    def handle(self, rank: int, message: dict[str, Any], now: float) -> None:
        """Handle one message of a rank."""
        if "bye" in message:
            self._monitor.left(rank)
        elif "failed" in message:
            self._monitor.failed(rank, str(message["failed"]), int(message["code"]), now)
        else:
            self._monitor.record(rank, message, now)

    def drop(self, channel: Channel, rank: int | None, now: float) -> None:
        """Handle the end of a connection."""
        self._selector.unregister(channel.socket)
        channel.socket.close()
        if rank is not None:
            del self._channels[rank]
            self._monitor.gone(rank, now)

    def _send_all(self, **message: Any) -> None:
        for channel in self._channels.values():
            channel.send(**message)


class _Connection:
    """A connection to rank 0: a stranger until it has sent the secret."""

    def __init__(self, coordinator: Coordinator, channel: Channel) -> None:
        self._coordinator, self._channel = coordinator, channel
        self._rank: int | None = None

    def __call__(self, now: float) -> None:
        """Read and handle what has arrived."""
        messages = self._channel.receive()
        for message in messages or ():
            if self._rank is None:
                self._rank = self._coordinator.admit(self._channel, message, now)
                if self._rank is None:
                    messages = None
                    break
            else:
                self._coordinator.handle(self._rank, message, now)
        if messages is None:
            self._coordinator.drop(self._channel, self._rank, now)
