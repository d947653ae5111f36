"""What ranks say to one another beside the training: lines of JSON over TCP, whose end is noticed."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

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
