"""The thread of the watchdog on any rank but 0: it tells rank 0 what this one does, and ends it when told to."""

from __future__ import annotations

import selectors
import signal
import socket
import time

from pipeline.watchdog.channel import Channel
from pipeline.watchdog.monitor import SETTLE_S, TERMINATED
from pipeline.watchdog.watchdog import BYE, FAILED, HEARTBEAT_S, TERMINATED_CODE, Watchdog

CONNECT_S = 20.0


class Worker:
    """The thread of any other rank."""

    def __init__(self, watch: Watchdog, address: tuple[str, int], secret: int) -> None:
        self._watch, self._address, self._secret = watch, address, secret
        self._rank0 = "rank 0"

    def run(self) -> None:
        """Say what this rank does, until it is done, or told to stop, or rank 0 is gone."""
        watch = self._watch
        try:
            connection = socket.create_connection(self._address, timeout=CONNECT_S)
        except OSError as error:
            host, port = self._address
            text = f"rank {watch.rank} cannot reach the watchdog of rank 0 at {host}:{port} ({error})"
            watch.warn(f"{text}: if it hangs, only the limit of collectives will end the job")
            return
        connection.settimeout(None)
        channel = Channel(connection)
        channel.send(secret=self._secret, rank=watch.rank, place=watch.place)
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(watch.wake_out, selectors.EVENT_READ)
            while self._turn(selector, channel):
                pass
        connection.close()

    def _turn(self, selector: selectors.BaseSelector, channel: Channel) -> bool:
        """Wait for news or the next pulse; return False at the end."""
        watch = self._watch
        ready = {key.fileobj for key, _ in selector.select(HEARTBEAT_S)}
        asked = watch.commands()
        if signal.SIGTERM in asked:  # the reason may be on its way: see Watchdog._catch_signals
            ready |= {key.fileobj for key, _ in selector.select(1.0)}
        if channel.socket in ready and not self._hear(channel):
            return False
        if FAILED in asked and watch.failure is not None:
            channel.send(**watch.next_heartbeat())  # the step it failed at
            channel.send(failed=watch.failure[0], code=watch.failure[1])
        elif BYE in asked:
            channel.send(bye=True)
            return False
        elif signal.SIGTERM in asked:
            channel.send(failed=TERMINATED, code=TERMINATED_CODE)
            watch.leave(TERMINATED, TERMINATED_CODE, stacks=True)
        else:
            channel.send(**watch.next_heartbeat())
        return True

    def _hear(self, channel: Channel) -> bool:
        """Take up what rank 0 says; return False when there is nothing more to come."""
        messages = channel.receive()
        if messages is None:
            time.sleep(SETTLE_S)  # if this rank is to die of the same kill, there is nothing to say
            text = f"{self._rank0} died: killed, or out of host memory; this rank was in {self._watch.heartbeat.words}"
            self._watch.lost(text, self._watch.heartbeat.step)
            self._watch.leave(text, 1, stacks=True)
            return False
        for message in messages:
            if "stop" in message:
                self._watch.leave(str(message["stop"]), int(message["code"]), stacks=bool(message["stacks"]))
            if "stop" in message or "bye" in message:
                return False
            self._rank0 = str(message.get("lead", self._rank0))
        return True
