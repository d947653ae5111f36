"""Answers as OpenAI's API writes them: whole, and in chunks of an event stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.server.sampling import Choice

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """Writes the reply to one request."""

    model: str
    prompt_tokens: int
    spell: Callable[[int], str]
    """Returns the text of one token."""
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""

    def whole(self, text: str, tokens: Sequence[Choice], reason: str, generated: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(generated)}

    def chunk(self, delta: dict[str, str], tokens: Sequence[Choice] = (), reason: str | None = None) -> bytes:
        """Return one event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, generated: int) -> bytes:
        """Return the event with the counts of tokens."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(generated)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, generated: int) -> dict[str, int]:
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def _logprobs(self, tokens: Sequence[Choice]) -> dict[str, Any] | None:
        content = [self._token(token) for token in tokens if token.logprob is not None]
        return {"content": content, "refusal": None} if content else None

    def _token(self, token: Choice) -> dict[str, Any]:
        assert token.logprob is not None
        top = [self._entry(index, logprob) for index, logprob in token.top]
        return {**self._entry(token.id, token.logprob), "top_logprobs": top}

    def _entry(self, index: int, logprob: float) -> dict[str, Any]:
        """``id`` is an addition to OpenAI's shape: two tokens may be spelled alike."""
        text = self.spell(index)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "id": index}


def event(content: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
