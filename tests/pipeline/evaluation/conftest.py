"""A tiny export, the official files, and a judge behind a local URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.evaluation.official import write_all
from tests.pipeline.serving.helpers import make_export


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny models with different weights and masks."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ("mma", "causal"):
        (folder / name).mkdir()
    return tuple(make_export(folder / name, policy=name, max_position_embeddings=2048) for name in ("mma", "causal"))  # type: ignore[return-value]


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of every benchmark; tests that change one write their own."""
    return write_all(tmp_path_factory.mktemp("official"))


@dataclass
class JudgeServer:
    """What the server was sent, and what it does next."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    """HTTP codes of the next replies, before the good ones."""
    location: str = ""
    body: bytes | None = None
    """Sent instead of a chat completion."""


def reply(text: str) -> str:
    """Reply as a judge would to each of the three official prompts."""
    if "[Context]" in text:
        return "8 6\nbecause"
    return "0.5" if "Correctness" in text else "B"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    state = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(request)
            state.keys.append(self.headers.get("Authorization"))
            code = state.failures.pop(0) if state.failures else 200
            content = reply(request["messages"][-1]["content"])
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
            body = body if state.body is None else state.body
            self.send_response(code)
            if code // 100 == 3:
                self.send_header("Location", state.location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
