"""Models of the Hub: fetched from a server that speaks its protocol, pinned by commit, and one line when offline."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import snapshot_download

from pipeline.config.schema import ConfigError, ModelConfig
from pipeline.model import hub
from pipeline.model.hub import fetch_weights, pin_sources
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import WeightSource
from tests.pipeline.model.helpers import IMAGE_TOKENS, VOCAB, model_config, plain_llm, tiny_spec, whole_stage

OLD, NEW = "1" * 40, "2" * 40


@dataclass
class Server:
    """A repository ``acme/tiny`` on a local stand-in for the Hub; ``main`` is its newest commit."""

    files: dict[str, bytes]
    main: str = OLD
    asked: list[str] = field(default_factory=list)


def answer(server: Server, path: str) -> tuple[int, dict[str, str], bytes]:
    """Return code, headers and body of a GET or HEAD."""
    server.asked.append(path)
    place = path.split("?")[0]
    if place.startswith("/api/models/acme/tiny"):
        commit = next((each for each in (OLD, NEW) if each in place), server.main)
        names = [{"rfilename": name} for name in server.files]
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in server.files.items()
        ]
        body: Any = tree if "/tree/" in place else {"id": "acme/tiny", "sha": commit, "siblings": names}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
    for commit in (OLD, NEW):
        if (name := place.removeprefix(f"/acme/tiny/resolve/{commit}/")) in server.files:
            data = server.files[name]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}, data
    return 404, {"X-Error-Code": "RepoNotFound"}, b""


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "saved"
    plain_llm(whole_stage(tiny_spec())).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = Server({**files, "pytorch_model.bin": b"pickle", "original/model.safetensors": b"other", "run.py": b"code"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, headers, body = answer(state, self.path)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}"

    def download(*args: Any, **options: Any) -> str:
        return str(snapshot_download(*args, **options, endpoint=url, cache_dir=tmp_path / "cache"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    yield state
    http.shutdown()
    http.server_close()


def from_hub(source: str) -> ModelConfig:
    return ModelConfig.model_validate(model_config().model_dump() | {"llm": {"source": source}})


def record(run_dir: Path, model: ModelConfig) -> None:
    """Write what a start of the run records."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(json.dumps({"model": model.model_dump()}))


def test_a_hub_source_is_fetched_and_its_commit_pinned(server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = pin_sources(from_hub("acme/tiny"), run_dir)
    assert first.llm.source == f"acme/tiny@{OLD}"
    spec = ModelSpec.resolve(first, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert not list(Path(spec.llm_source).glob("*.safetensors")), "weights are not needed to plan"
    fetch_weights(first)
    kept = {path.name for path in Path(spec.llm_source).rglob("*")}
    assert "model.safetensors" in kept and not kept & {"pytorch_model.bin", "original", "run.py"}
    whole_stage(spec, source=WeightSource.open(spec))

    record(run_dir, first)
    server.main = NEW  # the repository moves on; the run stays, a new run and an explicit revision do not
    assert pin_sources(from_hub("acme/tiny"), run_dir).llm.source == f"acme/tiny@{OLD}"
    assert pin_sources(from_hub("acme/tiny"), tmp_path / "other").llm.source == f"acme/tiny@{NEW}"
    assert pin_sources(from_hub("acme/tiny@main"), run_dir).llm.source == f"acme/tiny@{NEW}"


def test_a_missing_repository_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.llm\.source=acme/nothing is no local folder, .*check the name"
    ) as caught:
        pin_sources(from_hub("acme/nothing"), tmp_path)
    assert "\n" not in str(caught.value)


def test_offline_a_cached_model_works_and_another_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = pin_sources(from_hub("acme/tiny"), tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    spec = ModelSpec.resolve(pinned, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert spec.llm.model_type == "llama" and not server.asked
    with pytest.raises(ConfigError, match=r"run `hf download acme/other` where there is a network") as caught:
        ModelSpec.resolve(from_hub("acme/other"), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["models/llama", "/models/llama", "llama", "../a/b", "a/b/c", "a b/c"])
def test_a_folder_is_never_looked_up_on_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert hub.folder_of("model.llm", source) == Path(source)
