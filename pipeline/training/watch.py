"""The watchdog: a rank that dies, fails or hangs ends the whole job at once, in words.

Each rank keeps one TCP connection to rank 0 from a thread of its own and says once a second what it does. Rank 0 sees
a connection that ends (kill -9, no memory; a node that is lost answers no more, and its connections end after
``LOST_S``) and time in which no rank gets any further; it then names the rank that is the cause and what the others
wait for, in one report, and tells all ranks to stop. They write their Python stacks to ``RUN/logs/rank-N.log`` and
leave with a non-zero exit code from the thread, since the training thread may sit in a collective for ever. Ranks that
lose rank 0 do the same.

Where rank 0 cannot be reached over TCP there is a warning and no watchdog; collectives still end by their own limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import IO, Any

from pipeline.training.activity import Activity
from pipeline.training.monitor import SETTLE_S, TERMINATED, Monitor, Verdict

PULSE_S = 1.0
CONNECT_S = 20.0
SUSPENDED_S = 30.0
"""A turn of this loop takes a second; after so many the process was not running (a suspended job), nor was training."""
PATIENCE_S = 30.0
LINE_BYTES = 1 << 16
LOST_S = 60
"""A peer whose kernel answers nothing for so long is lost; that of a process that is merely held goes on answering."""
_LOST_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # rank 0 sends next to nothing: it has to ask
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_S // 6),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_S),  # the others send, and what is sent is not asked for
)
TERMINATED_CODE = 128 + signal.SIGTERM
_BYE, _FAILED = 200, 201  # beside numbers of signals, which come through the same pipe


def listen() -> socket.socket:
    """Open a port for rank 0 on all interfaces. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # known to the library, switched off on this machine
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


class Channel:
    """Lines of JSON over a socket that never blocks its reader."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected TCP socket, and let its connection end when the other side is lost."""
        for level, option, value in _LOST_OPTIONS:
            connection.setsockopt(level, option, value)
        self.socket = connection
        self._held = b""

    def send(self, **message: Any) -> None:
        """Send one message; an error is left to the reader, who will meet the end of the connection."""
        try:
            self.socket.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that are complete, or None when the connection has ended or is not one of ours."""
        try:
            data = self.socket.recv(LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._held = (self._held + data).split(b"\n")
        if not data or len(self._held) > LINE_BYTES:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):  # anyone may connect, and say anything
            return None


class Watch:
    """One rank's part in the watchdog; `doing` and `step` are what the training loop tells it."""

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        place: str,
        timeout_s: float,
        log: IO[str],
        report: Callable[[Verdict], None],
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
        self.activity = Activity()
        self._rank, self._world, self._place, self._timeout_s = rank, world, place, timeout_s
        self._log, self._report, self._lost = log, report, lost
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread: threading.Thread | None = None
        self._failure: tuple[str, int] | None = None
        self._old_signals: tuple[Any, int] | None = None

    def lead(self, listener: socket.socket, secret: int) -> None:
        """Begin to watch as rank 0; ``secret`` is what the others must know."""
        self._start(_Lead(self, listener, secret).run)

    def follow(self, address: tuple[str, int], secret: int) -> None:
        """Begin to watch as any other rank, from rank 0's address."""
        self._start(_Follower(self, address, secret).run)

    def _start(self, work: Callable[[], None]) -> None:
        self._catch_signals()
        faulthandler.enable(self._log)
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="watchdog", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the watchdog must never be what ends a job
            self.warn(
                f"the watchdog of rank {self._rank} has ended ({type(error).__name__}: {error}); training goes on"
            )
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
        self._failure = (error, code)
        self._command(_FAILED)
        assert self._thread is not None
        self._thread.join(PATIENCE_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Take leave of the other ranks: this one is done."""
        if self._thread is not None:
            self._command(_BYE)
            self._thread.join(PATIENCE_S)
        self._release_signals()

    def _command(self, number: int) -> None:
        self._wake_in.send(bytes([number]))

    def commands(self) -> list[int]:
        """Return what the training thread, or a signal, has asked of the watchdog's thread."""
        try:
            return list(self._wake_out.recv(64))
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

    def beat(self) -> dict[str, Any]:
        """Return this rank's pulse, and see to it that the stacks are written even if no thread gets to run again."""
        faulthandler.dump_traceback_later(self._timeout_s + 15, file=self._log)
        return self.activity.pulse()

    def leave(self, text: str, code: int, *, stacks: bool) -> None:
        """End this process from the watchdog's thread, unless its training thread ends by itself."""
        if self._failure is not None:
            return
        self._log.write(f"{text}\n")
        self._log.flush()
        if stacks:
            faulthandler.dump_traceback(self._log, all_threads=True)
        os._exit(code)


def _pass(number: int, frame: FrameType | None) -> None:
    """Leave a signal to the watchdog's thread."""


class _Lead:
    """Rank 0's thread."""

    def __init__(self, watch: Watch, listener: socket.socket, secret: int) -> None:
        self._watch, self._listener, self._secret = watch, listener, secret
        self._monitor = Monitor(watch._world, watch._timeout_s)
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, Channel] = {}

    def run(self) -> None:
        """Watch until this rank is done or the job has failed."""
        try:
            self._run()
        except Exception:
            self._tell_all(bye=True)  # or the end of their connections would be the end of the other ranks
            raise

    def _run(self) -> None:
        watch, monitor = self._watch, self._monitor
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(watch._wake_out, selectors.EVENT_READ)
        last = beaten = time.monotonic()
        monitor.join(0, watch._place, last)
        while True:
            events = self._selector.select(SETTLE_S / 2 if monitor.troubled else PULSE_S)
            now = time.monotonic()
            if now - last > SUSPENDED_S:
                monitor.forgive(now - last)
            last = now
            asked = self._serve(events, now)
            if asked or now - beaten >= PULSE_S:
                monitor.pulse(0, watch.beat(), now)
                beaten = now
            elif not monitor.troubled:
                continue
            if self._decide(asked, now):
                return

    def _decide(self, asked: list[int], now: float) -> bool:
        """Look whether the job has failed or this rank is to end; return whether there is nothing more to watch."""
        watch, monitor = self._watch, self._monitor
        terminated = signal.SIGTERM in asked
        if _FAILED in asked and watch._failure is not None:
            monitor.failed(0, *watch._failure, now)
        verdict = monitor.verdict(now, terminated=terminated)
        if verdict is not None:
            stacks = verdict.kind != "error"
            self._tell_all(stop=verdict.text, code=verdict.code, stacks=stacks)
            try:
                watch._report(verdict)
            finally:  # whatever becomes of the report, the job ends
                watch.leave(verdict.text, verdict.code, stacks=stacks)
        elif _BYE in asked:
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
            self._monitor.pulse(rank, message, now)

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

    def __init__(self, lead: _Lead, channel: Channel) -> None:
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


class _Follower:
    """The thread of any other rank."""

    def __init__(self, watch: Watch, address: tuple[str, int], secret: int) -> None:
        self._watch, self._address, self._secret = watch, address, secret
        self._lead = "rank 0"

    def run(self) -> None:
        """Say what this rank does, until it is done, or told to stop, or rank 0 is gone."""
        watch = self._watch
        try:
            connection = socket.create_connection(self._address, timeout=CONNECT_S)
        except OSError as error:
            host, port = self._address
            text = f"rank {watch._rank} cannot reach the watchdog of rank 0 at {host}:{port} ({error})"
            watch.warn(f"{text}: if it hangs, only the limit of collectives will end the job")
            return
        connection.settimeout(None)
        channel = Channel(connection)
        channel.send(secret=self._secret, rank=watch._rank, place=watch._place)
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(watch._wake_out, selectors.EVENT_READ)
            while self._turn(selector, channel):
                pass
        connection.close()

    def _turn(self, selector: selectors.BaseSelector, channel: Channel) -> bool:
        """Wait for news or the next pulse; return False at the end."""
        watch = self._watch
        ready = {key.fileobj for key, _ in selector.select(PULSE_S)}
        asked = watch.commands()
        if signal.SIGTERM in asked:  # the reason may be on its way: see Watch._catch_signals
            ready |= {key.fileobj for key, _ in selector.select(1.0)}
        if channel.socket in ready and not self._hear(channel):
            return False
        if _FAILED in asked and watch._failure is not None:
            channel.send(**watch.beat())  # the step it failed at
            channel.send(failed=watch._failure[0], code=watch._failure[1])
        elif _BYE in asked:
            channel.send(bye=True)
            return False
        elif signal.SIGTERM in asked:
            channel.send(failed=TERMINATED, code=TERMINATED_CODE)
            watch.leave(TERMINATED, TERMINATED_CODE, stacks=True)
        else:
            channel.send(**watch.beat())
        return True

    def _hear(self, channel: Channel) -> bool:
        """Take up what rank 0 says; return False when there is nothing more to come."""
        messages = channel.receive()
        if messages is None:
            time.sleep(SETTLE_S)  # if this rank is to die of the same kill, there is nothing to say
            text = f"{self._lead} died: killed, or out of host memory; this rank was in {self._watch.activity.words}"
            self._watch._lost(text, self._watch.activity.step)
            self._watch.leave(text, 1, stacks=True)
            return False
        for message in messages:
            if "stop" in message:
                self._watch.leave(str(message["stop"]), int(message["code"]), stacks=bool(message["stacks"]))
            if "stop" in message or "bye" in message:
                return False
            self._lead = str(message.get("lead", self._lead))
        return True
