"""The connection between two watchdogs: lines of JSON over TCP; a lost peer is detected."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

LINE_BYTES = 1 << 16
LOST_S = 60
"""A peer is lost when its kernel has not answered for this long. The kernel of a stopped process still answers."""
_LOST_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # detects a lost peer while nothing is being sent
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_S // 6),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_S),  # unacknowledged data suspends keepalive probes
)


def listen() -> socket.socket:
    """Open a port for rank 0 on all interfaces. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, but disabled on this machine
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


class Channel:
    """Sends and receives JSON lines; receiving never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected TCP socket and set its options to detect a lost peer."""
        for level, option, value in _LOST_OPTIONS:
            connection.setsockopt(level, option, value)
        self.socket = connection
        self._partial = b""

    def send(self, **message: Any) -> None:
        """Send one message. Errors are ignored: the next `receive` reports the end of the connection."""
        try:
            self.socket.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the complete messages, or None when the connection has ended or the peer is not a watchdog."""
        try:
            data = self.socket.recv(LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data or len(self._partial) > LINE_BYTES:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):  # anyone may connect and send anything
            return None
