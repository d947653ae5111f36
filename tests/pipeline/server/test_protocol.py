"""Requests: what is read, and the one line that each wrong one gets."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.server.errors import ApiError
from pipeline.server.images import ImageRules
from pipeline.server.protocol import Conversation, parse

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "how many"}]}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def refused(call: Any, *values: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*values)
    assert "\n" not in caught.value.message
    return caught.value


def png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "PNG")
    return data.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_a_request_of_the_client_library_is_read() -> None:
    request = parse(
        json.dumps(
            {
                **ASKED,
                "model": "m",
                "temperature": 1,
                "top_p": 0.5,
                "max_tokens": 7,
                "seed": 3,
                "stop": ["a", "b"],
                "n": 1,
                "user": "u",
                "stream_options": {"include_usage": True},
                "frequency_penalty": 0.0,
                "tools": [],
                "logprobs": None,
            }
        ).encode()
    )
    assert (request.new_tokens, request.stops, request.sampling.temperature) == (7, ("a", "b"), 1.0)
    assert request.sampling.top_p == 0.5 and request.sampling.seed == 3 and request.sampling.top_logprobs is None


def test_a_bare_request_is_greedy() -> None:
    request = parse(json.dumps(ASKED).encode())
    assert request.sampling.temperature == 0.0 and request.new_tokens is None and request.stops == ()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ({}, "messages: Field required"),
        ({"messages": []}, "messages"),
        ({**ASKED, "temperature": 3}, "temperature: Input should be less than or equal to 2, got 3"),
        ({**ASKED, "temperature": "1"}, "temperature"),
        ({**ASKED, "temperature": float("nan")}, "temperature"),
        ({**ASKED, "top_p": 0}, "top_p"),
        ({**ASKED, "max_tokens": 0}, "max_tokens"),
        ({**ASKED, "max_tokens": True}, "max_tokens"),
        ({**ASKED, "seed": 1 << 70}, "seed"),
        ({**ASKED, "stop": ["a"] * 5}, "stop"),
        ({**ASKED, "stop": [""]}, "stop"),
        ({**ASKED, "top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({**ASKED, "n": 2}, "n=2 is not supported: leave n out"),
        ({**ASKED, "frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
        ({**ASKED, "tools": [{}]}, "tools"),
        ({**ASKED, "temprature": 1}, "unknown parameter 'temprature' (did you mean 'temperature'?)"),
    ],
)
def test_a_wrong_request_is_refused_by_name(raw: Any, words: str) -> None:
    error = refused(parse, (raw if isinstance(raw, str) else json.dumps(raw)).encode())
    assert error.status == 400 and words in error.message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([3], "messages[0]: not an object"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not supported"),
        ([{"role": "user", "content": "  "}], "messages[0]: the content is empty"),
        ([{"role": "user"}], "neither a text nor a list"),
        ([user({"type": "audio"})], "content type 'audio' is not supported"),
        ([user({"type": "image_url"})], "image_url holds no url"),
        ([user("text")], "content type None"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
        ([{"role": "system", "content": "a"}], "the last message must be the user's"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "messages[1]: the role is user, but"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message must be the user's"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "messages[1]: the role is system"),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": "data:,"}]}],
            "only user messages may",
        ),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], "'tool_calls' is not supported"),
    ],
)
def test_wrong_messages_are_refused_by_number(messages: list[Any], words: str) -> None:
    error = refused(Conversation.read, messages)
    assert error.status == 400 and words in error.message and (error.param or "").startswith("messages[")


def test_images_keep_their_place() -> None:
    url = data_url(png(3, 3))
    image = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    messages = [
        {"role": "developer", "content": "short"},
        user(image, {"type": "text", "text": "left"}),
        {"role": "assistant", "content": "red"},
        user({"type": "text", "text": "right"}, image),
    ]
    conversation = Conversation.read(messages)
    turns = conversation.with_images(ImageRules().read(conversation.urls))
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert [[part if isinstance(part, str) else part.name for part in turn.parts] for turn in turns] == [
        ["short"],
        ["1 of the request", "left"],
        ["red"],
        ["right", "2 of the request"],
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures with a way out, which must stay closed."""
    (tmp_path / "pictures/deep").mkdir(parents=True)
    (tmp_path / "pictures/deep/a b.png").write_bytes(png(4, 4))
    (tmp_path / "secret.png").write_bytes(png(5, 5))
    (tmp_path / "pictures/link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "pictures"


def test_files_of_the_folder_are_read(folder: Path) -> None:
    rules = ImageRules(folder=folder)
    for url in (f"file://{folder}/deep/a%20b.png", "file:deep/a%20b.png", f"file://localhost{folder}/deep/a%20b.png"):
        assert rules.read([url])[0].data == png(4, 4)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/../secret.png", "link.png", "deep", "none.png", "deep/%00", "%2e%2e/secret.png"]
)
def test_no_path_leads_out_of_the_folder(path: str, folder: Path) -> None:
    for url in (f"file:{path}", f"file://{folder}/{path}", f"file://elsewhere/{path}"):
        error = refused(ImageRules(folder=folder).read, [url])
        assert (error.status, error.message) == (
            400,
            "image 1 of the request is not a readable file in the server's image folder",
        )


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("file:///etc/passwd", 400, "does not read"),
        ("http://169.254.169.254/latest", 400, "does not fetch from"),
        ("https://example.com/a.png", 400, "does not fetch from"),
        ("http://[", 400, "does not fetch from"),
        ("ftp://example.com/a.png", 400, "is no URL"),
        ("cat.png", 400, "is no URL"),
        ("data:image/png,abc", 400, "not base64"),
        ("data:image/png;base64,@@@@", 400, "not valid base64"),
        ("data:image/png;base64,", 400, "empty-file"),
        (data_url(b"GIF8 torn"), 400, "image 1 of the request cannot be used"),
        (data_url(png(4, 4)[:40]), 400, "cannot be used"),
        (data_url(b"\0" * 5000), 413, "more than 0.00390625 MiB"),
        (data_url(png(400, 300)), 413, "more than 0.1 megapixels together"),
    ],
)
def test_images_that_cannot_be_used_are_refused(url: str, status: int, words: str) -> None:
    error = refused(ImageRules(max_bytes=4096, max_pixels=100_000).read, [url])
    assert error.status == status and words in error.message and "image" in error.message


def test_too_many_images_and_pixels_are_refused() -> None:
    url = data_url(png(100, 100))
    assert refused(ImageRules(max_images=2).read, [url] * 3).status == 413
    assert len(ImageRules(max_pixels=30_000).read([url] * 3)) == 3
    assert refused(ImageRules(max_pixels=30_000).read, [url] * 4).status == 413


class Host(BaseHTTPRequestHandler):
    """Sends a picture, or a redirect to it."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "/one.png")
        self.end_headers()
        self.wfile.write(png(4, 4) if self.path == "/one.png" else b"\0" * 5000)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_pictures_are_fetched_from_listed_hosts_only() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        rules = ImageRules(hosts=("127.0.0.1",), max_bytes=4096)
        assert rules.read([f"{url}/one.png"])[0].data == png(4, 4)
        assert "cannot be fetched" in refused(rules.read, [f"{url}/moved"]).message
        assert refused(rules.read, [f"{url}/large"]).status == 413
        for other in (ImageRules(), ImageRules(hosts=("localhost",))):
            assert "does not fetch from" in refused(other.read, [f"{url}/one.png"]).message
        tricky = [
            f"http://127.0.0.1@example.com:{server.server_port}/one.png",
            "http:///one.png",
            "http://127.0.0.1:x/",
        ]
        assert all(refused(rules.read, [one]).status == 400 for one in tricky)
    finally:
        server.shutdown()
        server.server_close()
