"""Requests of `mma serve`: the JSON, its messages and its images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

from PIL import Image

from pipeline.server.errors import ApiError
from pipeline.server.images import ImageRules
from pipeline.server.protocol import Conversation, parse

DICTIONARY = (
    *(b"null", b"NaN", b"1e999", b"-1", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"\\u0000", b"true"),
    *(b'"role":', b'"content":', b'"system"', b'"type":"text"', b'"image_url":', b'"stop":', b'"top_logprobs":'),
    *(b"file:///etc/passwd", b"http://[", b"data:image/png;base64,", b"data:", b"////", b"\xed\xa0\x80"),
)
_RULES = ImageRules(max_bytes=1 << 16, max_pixels=1 << 20)


def run(data: bytes) -> None:
    """Read a request as far as the model; a refusal is one line with a status of the client's."""
    try:
        conversation = Conversation.read(parse(data).messages)
        turns = conversation.with_images(_RULES.read(conversation.urls))
        assert turns[-1].role == "user"
        for turn in turns:
            "".join(part for part in turn.parts if isinstance(part, str)).encode()
    except ApiError as error:
        assert error.status in (400, 413) and "\n" not in error.message and len(error.message) < 2000
        json.dumps(error.body).encode()


def seeds() -> Iterator[bytes]:
    """Yield a conversation with pictures, and one with every parameter."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    user = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "é"}],
    }
    chat = [{"role": "system", "content": "a"}, user, {"role": "assistant", "content": "b"}, user]
    yield json.dumps({"messages": chat}).encode()
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "max_tokens": 3, "stop": ["a"], "top_logprobs": 2}
    rest = {"logprobs": True, "stream": True, "stream_options": {"include_usage": True}, "n": 1, "user": "u"}
    neutral = {"tools": [], "logit_bias": {}}
    yield json.dumps({"model": "m", "messages": chat[:2], **sampling, **rest, **neutral}).encode()
