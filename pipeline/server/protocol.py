"""Requests of OpenAI's chat completions API, read and checked.

A parameter that would change the answer and is not supported is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.common.errors import did_you_mean, short_repr
from data_prep.example import ImageRef, Turn
from pipeline.server.errors import ApiError
from pipeline.server.sampling import Sampling

MAX_MESSAGES = 256
_NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Parameters that never change an answer."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Parameters that are not supported, with the values that ask for nothing."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_Model):
    """The parameters of a request; absent and null mean the same."""

    model: str | None = None
    messages: list[Any] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | Annotated[list[_Stop], Field(max_length=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return ((self.stop,) if self.stop else ()) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def new_tokens(self) -> int | None:
        """Limit of the answer; None if the request names none."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; greedy by default, as in `mma generate`."""
        top = (self.top_logprobs or 0) if self.logprobs else None
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(self.temperature or 0.0, top_p, self.seed, top)


def parse(body: bytes) -> ChatRequest:
    """Read a request. Raises ApiError 400 naming the parameter at fault."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON") from error
    if not isinstance(raw, dict):
        raise ApiError(400, "the body is not a JSON object")
    _check_unsupported(raw)
    try:
        request = ChatRequest(**{k: v for k, v in raw.items() if k not in _NO_EFFECT and k not in _NEUTRAL})
    except ValidationError as error:
        raise _refusal(error) from error
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return request


def _check_unsupported(raw: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            message = f"{name}={short_repr(value)} is not supported: leave {name} out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    known = {*ChatRequest.model_fields, *_NO_EFFECT, *_NEUTRAL}
    for name in raw:
        if name not in known:
            message = f"unknown parameter {short_repr(name)}{did_you_mean(str(name), known)}"
            raise ApiError(400, message, param=str(name)[:64], code="unknown_parameter")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in ChatRequest.model_fields)
    message = f"{where}: {first['msg']}" + ("" if where == "messages" else f", got {short_repr(first['input'])}")
    return ApiError(400, message, param=where.split(".")[0])


@dataclass(frozen=True)
class Conversation:
    """The messages of a request: turns whose images are still URLs."""

    turns: tuple[tuple[str, tuple[str | int, ...]], ...]
    """(role, parts); an int is the index of an image in ``urls``."""
    urls: tuple[str, ...]

    @classmethod
    def read(cls, messages: Sequence[Any]) -> Conversation:
        """Check the messages: an optional system message, then user and assistant in turn, user last.

        Raises:
            ApiError: 400 naming the message.
        """
        urls: list[str] = []
        turns = [_turn(number, raw, urls) for number, raw in enumerate(messages)]
        roles = [role for role, _ in turns]
        chat = roles[1:] if roles[0] == "system" else roles
        for number, role in enumerate(chat, start=len(roles) - len(chat)):
            wanted = ("user", "assistant")[(number - len(roles) + len(chat)) % 2]
            if role != wanted:
                raise _wrong(number, f"the role is {role}, but {wanted} must come here: roles alternate")
        if not chat or chat[-1] != "user":
            raise _wrong(len(roles) - 1, "the last message must be the user's")
        return cls(tuple(turns), tuple(urls))

    def with_images(self, images: Sequence[ImageRef]) -> list[Turn]:
        """Return the turns with their images."""
        return [
            Turn(role, tuple(part if isinstance(part, str) else images[part] for part in parts))  # type: ignore[arg-type]
            for role, parts in self.turns
        ]


def _turn(number: int, raw: Any, urls: list[str]) -> tuple[str, tuple[str | int, ...]]:
    if not isinstance(raw, dict):
        raise _wrong(number, "not an object with role and content")
    role = "system" if raw.get("role") == "developer" else raw.get("role")
    if role not in ("system", "user", "assistant"):
        raise _wrong(number, f"role {short_repr(role)} is not supported: use system, user or assistant")
    if extra := [key for key in raw if key not in ("role", "content", "name") and raw[key]]:
        raise _wrong(number, f"{short_repr(extra[0])} is not supported")
    content = raw.get("content")
    listed = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = tuple(_part(number, part, urls) for part in listed)
    if not any(isinstance(part, int) or part.strip() for part in parts):
        raise _wrong(number, "the content is empty")
    if role != "user" and any(isinstance(part, int) for part in parts):
        raise _wrong(number, f"a {role} message holds an image: only user messages may")
    return role, parts


def _part(number: int, part: Any, urls: list[str]) -> str | int:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(number, part.get("text"))
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise _wrong(number, "image_url holds no url")
        urls.append(url)
        return len(urls) - 1
    raise _wrong(number, f"content type {short_repr(kind)} is not supported: use text or image_url")


def _text(number: int, text: Any) -> str:
    if not isinstance(text, str):
        raise _wrong(number, "the content is neither a text nor a list of parts")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _wrong(number, "the text holds half a surrogate pair, which is not valid Unicode")
    return text


def _wrong(number: int, problem: str) -> ApiError:
    return ApiError(400, f"messages[{number}]: {problem}", param=f"messages[{number}]")
