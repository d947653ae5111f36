"""Runs the server until it is told to stop: SIGTERM or SIGINT finish what is running, a second one ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn

from data_prep.common.errors import UserError
from pipeline.server.app import ChatServer

CLOSE_S = 5
"""How long the last bytes of responses may take."""
_POLL_S = 0.05


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises UserError when the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
        own.listen(1024)
    except (OSError, OverflowError) as error:
        own.close()
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from error
    return own


def run(server: ChatServer, own: socket.socket, *, grace_s: float) -> None:
    """Serve until a signal; requests that still run ``grace_s`` seconds after it are cancelled."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CLOSE_S,
    )
    try:
        _Server(config, server, grace_s).run(sockets=[own])
    finally:
        server.engine.close()


class _Server(uvicorn.Server):
    """Uvicorn, which would close its sockets at the first signal; clients then could not learn why."""

    def __init__(self, config: uvicorn.Config, server: ChatServer, grace_s: float) -> None:
        super().__init__(config)
        self._engine, self._grace_s = server.engine, grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, then serve."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests and finish the rest; at the second signal, end at once."""
        if self._engine.stopping or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._engine.stop()
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                while not self._engine.idle:
                    await asyncio.sleep(_POLL_S)
        await asyncio.to_thread(self._engine.close)  # cancels what is left; its clients are told
        self.should_exit = True
