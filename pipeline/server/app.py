"""The HTTP application: OpenAI's chat completions, the model list, health, metrics and the page."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_prep.common.errors import UserError, one_line
from data_prep.quarantine import BadSample
from pipeline.server.answering import AnswerResponse, LiveAnswer
from pipeline.server.body import check_key, drain, read_body
from pipeline.server.engine import Busy, Engine, Stopping, Work
from pipeline.server.errors import ApiError
from pipeline.server.images import ImageRules
from pipeline.server.metrics import CONTENT_TYPE, Metrics
from pipeline.server.page import PAGE, PAGE_HEADERS
from pipeline.server.protocol import ChatRequest, Conversation, parse
from pipeline.server.replies import Reply
from pipeline.server.text import AnswerText

DECODERS = 2
"""Requests whose images are decoded at once; bounds memory."""


@dataclass(frozen=True)
class Settings:
    """What a server is told by its flags."""

    name: str
    """The model's name in requests."""
    key: str = ""
    """API key of ``/v1``; empty admits everyone."""
    images: ImageRules = field(default_factory=ImageRules)
    max_body_bytes: int = 64 << 20
    default_new_tokens: int = 512
    """Limit of an answer when the request names none; fewer where the model's positions end."""
    max_new_tokens: int = 4096
    """Largest limit that a request may name."""


class ChatServer:
    """The endpoints around one engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Wrap a running engine."""
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self._model = engine.steps.model
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
        self._spell = lru_cache(4096)(lambda index: self._model.tokenizer.decode([index], specials=True))

    @cached_property
    def app(self) -> ASGIApp:
        """The ASGI application."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        for path, method, handler in (
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.read_metrics),
            ("/", "GET", self.page),
        ):
            app.add_api_route(path, handler, methods=[method], response_model=None)
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _server_error)
        return _Counted(app, self.metrics)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        try:
            check_key(request, self.settings.key)
            ticket = self.engine.reserve()
        except Busy as busy:
            await drain(request)
            raise ApiError(429, str(busy), code="server_busy", retry_after_s=busy.retry_after_s) from busy
        except Stopping as error:
            raise ApiError(503, "the server is stopping and takes no new requests", retry_after_s=5) from error
        except ApiError:
            await drain(request)
            raise
        try:
            chat = await self._read(request)
            work = await asyncio.get_running_loop().run_in_executor(self._decoders, self._prepared, chat)
            text = AnswerText(self._model.tokenizer.decode, chat.stops)
            answer = LiveAnswer(self.engine, ticket, text, frozenset(self._model.export_config.eos_ids))
            answer.submit(work)
        except BaseException as error:
            self.engine.release(ticket)
            if isinstance(error, UserError):
                raise ApiError(400, one_line(error), param="messages") from error
            raise
        reply = Reply(self.settings.name, len(work.prepared), self._spell)
        usage = chat.stream_options is not None and chat.stream_options.include_usage
        return AnswerResponse(answer, reply, self.metrics, stream=bool(chat.stream), include_usage=usage)

    async def _read(self, request: Request) -> ChatRequest:
        try:
            chat = parse(await read_body(request, self.settings.max_body_bytes))
        except ApiError as error:
            if error.status in (413, 415):
                await drain(request)
            raise
        if chat.model not in (None, self.settings.name):
            raise self._unknown(chat.model)
        if chat.new_tokens is not None and chat.new_tokens > self.settings.max_new_tokens:
            limit = self.settings.max_new_tokens
            raise ApiError(400, f"max_tokens={chat.new_tokens} exceeds this server's {limit}", param="max_tokens")
        return chat

    def _prepared(self, chat: ChatRequest) -> Work:
        """Decode the images and encode the prompt; runs on a decoder's thread."""
        conversation = Conversation.read(chat.messages)
        turns = conversation.with_images(self.settings.images.read(conversation.urls))
        try:
            prompt = self._model.prompt(turns)
            new_tokens = chat.new_tokens or self._default_new_tokens(len(prompt.encoded))
            prepared = self.engine.steps.prepare(prompt, new_tokens)
        except (UserError, BadSample) as error:
            raise ApiError(400, one_line(error), param="messages") from error
        ends = frozenset(self._model.export_config.eos_ids) if chat.ignore_eos else frozenset()
        return Work(prepared, new_tokens, chat.sampling, ends)

    def _default_new_tokens(self, prompt: int) -> int:
        limit, wanted = self._model.spec.longest_segment, self.settings.default_new_tokens
        return wanted if limit is None else max(1, min(wanted, limit - prompt))

    def _unknown(self, name: str | None) -> ApiError:
        message = f"model {name!r:.80} does not exist; this server has {self.settings.name!r}"
        return ApiError(404, message, param="model", code="model_not_found")

    async def models(self, request: Request) -> Response:
        """List the one model."""
        check_key(request, self.settings.key)
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, request: Request, name: str) -> Response:
        """Describe the model of this name."""
        check_key(request, self.settings.key)
        if name != self.settings.name:
            raise self._unknown(name)
        return JSONResponse(self._description())

    def _description(self) -> dict[str, object]:
        """Return the model's entry; what follows ``owned_by`` is an addition to OpenAI's shape."""
        config = self._model.export_config
        return {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "mma",
            "max_model_len": self._model.spec.longest_segment,
            "mask_policy": config.policy,
            "step": config.step,
            "max_images": self.settings.images.max_images,
            "max_image_bytes": self.settings.images.max_bytes,
        }

    async def health(self, _: Request) -> Response:
        """Answer 200 while requests are accepted, else 503."""
        health = self.engine.health
        return JSONResponse({"status": health}, 200 if health == "ok" else 503)

    async def read_metrics(self, _: Request) -> Response:
        """Return the metrics."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def page(self, _: Request) -> Response:
        """Return the web page."""
        return Response(PAGE, headers=PAGE_HEADERS)


class _Counted:
    """Counts responses, and gives each an id and the headers that every response needs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(message["status"])
                own = ((b"x-request-id", secrets.token_hex(8).encode()), (b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _server_error(_: Request, error: Exception) -> Response:
    """Say no more than the type: the log has the traceback."""
    failed = ApiError(500, f"the server failed ({type(error).__name__}): its log tells more")
    return JSONResponse(failed.body, failed.status)
