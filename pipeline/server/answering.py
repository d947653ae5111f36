"""One answer on its way from the engine's thread to the client, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pipeline.server.engine import Engine, Event, Failed, Finished, Ticket, Work
from pipeline.server.errors import ApiError
from pipeline.server.metrics import Metrics
from pipeline.server.replies import DONE, Reply, event
from pipeline.server.sampling import Choice
from pipeline.server.text import AnswerText

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]


@dataclass(frozen=True)
class Piece:
    """Final text of an answer, with the tokens since the last piece."""

    text: str
    tokens: tuple[Choice, ...] = ()


@dataclass
class LiveAnswer:
    """The events of one request, read on the event loop."""

    engine: Engine
    ticket: Ticket
    text: AnswerText
    ends: frozenset[int]
    """End tokens; they are not part of the text."""
    reason: str = ""
    """Why the answer ended; empty before."""
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def submit(self, work: Work) -> None:
        """Queue the request. Raises UserError as :meth:`Engine.submit` does."""
        loop = asyncio.get_running_loop()

        def listen(one: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, one)

        self.engine.submit(self.ticket, work, listen)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it grows.

        Raises:
            ApiError: the engine failed, or gave the request up.
        """
        while not self.reason:
            piece = self._taken(await self._events.get())
            if piece is not None:
                yield piece

    def _taken(self, one: Event) -> Piece | None:
        if isinstance(one, Failed):
            self.reason = "failed"
            raise ApiError(400 if one.user else 500, one.message)
        if isinstance(one, Finished):
            self.reason = one.reason
            if one.reason == "cancelled":
                raise ApiError(503, "the request was cancelled because the server is stopping", retry_after_s=5)
            return Piece(self.text.finish())
        text = "" if one.id in self.ends else self.text.push(one.id)
        if self.text.stopped:
            self.reason = "stop"
            self.engine.cancel(self.ticket)
        return Piece(text, (one,)) if text or one.logprob is not None else None


class AnswerResponse(Response):
    """Sends one answer; a client that disconnects cancels it."""

    def __init__(
        self, answer: LiveAnswer, reply: Reply, metrics: Metrics, *, stream: bool, include_usage: bool
    ) -> None:
        """Take over a submitted request; its place is given back when the response ends."""
        super().__init__()
        self._answer, self._reply, self._metrics = answer, reply, metrics
        self._stream, self._include_usage = stream, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        answer = self._answer
        watch = asyncio.create_task(_disconnected(receive))
        watch.add_done_callback(lambda _: answer.engine.cancel(answer.ticket))
        try:
            pieces = answer.pieces()
            first = await anext(pieces, None)  # a failure before the first token still gets its own status
            if self._stream:
                await self._send_events(first, pieces, send)
            else:
                await self._whole(await _rest(first, pieces))(scope, receive, send)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        finally:
            watch.cancel()
            answer.engine.release(answer.ticket)
            self._metrics.answered(answer.ticket, self._reply.prompt_tokens, answer.reason or "cancelled")

    def _whole(self, pieces: list[Piece]) -> JSONResponse:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        return JSONResponse(self._reply.whole(text, tokens, self._answer.reason, self._answer.ticket.generated))

    async def _send_events(self, first: Piece | None, pieces: AsyncIterator[Piece], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await _send(send, self._reply.chunk({"role": "assistant", "content": ""}))
        try:
            if first is not None:
                await self._send_piece(first, send)
            async for piece in pieces:
                await self._send_piece(piece, send)
        except ApiError as error:  # an incomplete answer must not look like a whole one
            await _send(send, event(error.body), last=True)
            return
        end = self._reply.chunk({}, reason=self._answer.reason)
        if self._include_usage:
            end += self._reply.usage_chunk(self._answer.ticket.generated)
        await _send(send, end + DONE, last=True)

    async def _send_piece(self, piece: Piece, send: Send) -> None:
        if piece.text or piece.tokens:
            await _send(send, self._reply.chunk({"content": piece.text}, piece.tokens))


async def _rest(first: Piece | None, pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [*filter(None, [first]), *[piece async for piece in pieces]]


async def _send(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
