"""Rank 0's thread of the watchdog: it hears all ranks, and decides when the job has failed."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from typing import Any

from pipeline.watchdog.channel import Channel
from pipeline.watchdog.monitor import SETTLE_S, TERMINATED, Monitor
from pipeline.watchdog.watchdog import BYE, FAILED, HEARTBEAT_S, TERMINATED_CODE, Watchdog

SUSPENDED_S = 30.0
"""A turn of this loop takes a second; after so many the process was not running (a suspended job), nor was training."""


class Coordinator:
    """Rank 0's thread."""

    def __init__(self, watch: Watchdog, listener: socket.socket, secret: int) -> None:
        self._watch, self._listener, self._secret = watch, listener, secret
        self._monitor = Monitor(watch.world, watch.timeout_s)
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, Channel] = {}

    def run(self) -> None:
        """Watchdog until this rank is done or the job has failed."""
        try:
            self._run()
        except Exception:
            self._tell_all(bye=True)  # or the end of their connections would be the end of the other ranks
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
            asked = self._serve(events, now)
            if asked or now - last_heartbeat >= HEARTBEAT_S:
                monitor.record(0, watch.next_heartbeat(), now)
                last_heartbeat = now
            elif not monitor.troubled:
                continue
            if self._decide(asked, now):
                return

    def _decide(self, asked: list[int], now: float) -> bool:
        """Look whether the job has failed or this rank is to end; return whether there is nothing more to watch."""
        watch, monitor = self._watch, self._monitor
        terminated = signal.SIGTERM in asked
        if FAILED in asked and watch.failure is not None:
            monitor.failed(0, *watch.failure, now)
        diagnosis = monitor.diagnosis(now, terminated=terminated)
        if diagnosis is not None:
            stacks = diagnosis.kind != "error"
            self._tell_all(stop=diagnosis.text, code=diagnosis.code, stacks=stacks)
            try:
                watch.report(diagnosis)
            finally:  # whatever becomes of the report, the job ends
                watch.leave(diagnosis.text, diagnosis.code, stacks=stacks)
        elif BYE in asked:
            self._tell_all(bye=True)
        elif terminated:
            self._tell_all(stop=TERMINATED, code=TERMINATED_CODE, stacks=True)
            watch.leave(TERMINATED, TERMINATED_CODE, stacks=True)
        else:
            return False
        return True

    def _serve(self, events: list[tuple[selectors.SelectorKey, int]], now: float) -> list[int]:
        """Read what has come in; return what the training thread asks for."""
        for key, _ in events:
            if key.data is not None:
                key.data(now)
        asked = self._watch.commands()
        if signal.SIGTERM in asked:  # whoever sent it may have done so because of news that is here already
            for key, _ in self._selector.select(0.2):
                if key.data is not None:
                    key.data(now)
        return asked

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._listener.accept()
            channel = Channel(connection)
        except OSError:  # gone again
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Guest(self, channel))

    def greet(self, channel: Channel, message: dict[str, Any], now: float) -> int | None:
        """Let a rank in that knows the secret; return its number, or None for a stranger."""
        if message.get("secret") != self._secret:
            return None
        rank = int(message["rank"])
        self._channels[rank] = channel
        self._monitor.join(rank, str(message["place"]), now)
        channel.socket.setblocking(True)  # its lines are short; `recv` is called when there is something
        channel.send(lead=str(self._monitor.members[0]))
        return rank

    def hear(self, rank: int, message: dict[str, Any], now: float) -> None:
        """Take up one message of a rank."""
        if "bye" in message:
            self._monitor.left(rank)
        elif "failed" in message:
            self._monitor.failed(rank, str(message["failed"]), int(message["code"]), now)
        else:
            self._monitor.record(rank, message, now)

    def drop(self, channel: Channel, rank: int | None, now: float) -> None:
        """Take note of a connection that has ended."""
        self._selector.unregister(channel.socket)
        channel.socket.close()
        if rank is not None:
            del self._channels[rank]
            self._monitor.gone(rank, now)

    def _tell_all(self, **message: Any) -> None:
        for channel in self._channels.values():
            channel.send(**message)


class _Guest:
    """A connection at rank 0: a stranger until it has said the secret."""

    def __init__(self, lead: Coordinator, channel: Channel) -> None:
        self._lead, self._channel = lead, channel
        self._rank: int | None = None

    def __call__(self, now: float) -> None:
        """Read what is there."""
        messages = self._channel.receive()
        for message in messages or ():
            if self._rank is None:
                self._rank = self._lead.greet(self._channel, message, now)
                if self._rank is None:
                    messages = None
                    break
            else:
                self._lead.hear(self._rank, message, now)
        if messages is None:
            self._lead.drop(self._channel, self._rank, now)
