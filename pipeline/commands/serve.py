"""``mma serve`` and ``mma chat``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError
from pipeline.commands.arguments import number_between
from pipeline.commands.model import add_verify, load

if TYPE_CHECKING:
    from pipeline.server.engine import Engine
    from pipeline.server.images import ImageRules
    from pipeline.serving.model import MultimodalModel

KEY_VARIABLE = "MMA_API_KEY"
SERVE = f"""\
Serve a model over HTTP with OpenAI's chat completions API, and as a web page at /.

  mma serve models/demo
  mma serve models/demo --images data/pictures --api-key-file key.txt --host 0.0.0.0
  curl localhost:8000/v1/models

  POST /v1/chat/completions   streamed or whole; images as data URLs
  GET  /v1/models /health /metrics /

The key comes from --api-key-file or {KEY_VARIABLE}; without one, everyone who reaches the port may use the model.
SIGTERM and Ctrl-C finish the running requests first; a second one ends at once. docs/serving.md tells more."""
CHAT = """\
Talk to a model in the terminal; answers are streamed.

  mma chat models/demo
  mma chat models/demo --system "Answer in one word."

  photo.jpg What is shown?    image files first, then the question
  /image FILE                 add an image to the next question
  /system TEXT                set the system message and begin a new chat
  /reset                      begin a new chat
  /help, /quit                Ctrl-C stops an answer, Ctrl-D leaves"""
_SERVER_NEEDS = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_GPU_FRACTION, _RAM_FRACTION = 0.8, 0.5
"""Shares of the free GPU memory, or of the machine's memory, that the cache may take by default."""


def _serve(arguments: argparse.Namespace) -> None:
    _check_installed()
    from pipeline.server.app import ChatServer, Settings
    from pipeline.server.run import listen, run

    key, images = _key(arguments.api_key_file), _image_rules(arguments)
    own = listen(arguments.host, arguments.port)
    try:
        engine = _engine(load(arguments.model, arguments), arguments)
        settings = Settings(
            name=arguments.name or Path(arguments.model).resolve().name,
            key=key,
            images=images,
            max_body_bytes=arguments.max_body_mb << 20,
            default_new_tokens=min(Settings.default_new_tokens, arguments.max_new_tokens),
            max_new_tokens=arguments.max_new_tokens,
        )
        _announce(engine, settings.name, own.getsockname(), has_key=bool(key))
        run(ChatServer(engine, settings), own, grace_s=arguments.grace)
    finally:
        own.close()


def _check_installed() -> None:
    for module, package in _SERVER_NEEDS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            needed = " ".join(_SERVER_NEEDS.values())
            raise UserError(f"mma serve needs {package}, which is not installed: pip install {needed}") from error


def _engine(model: MultimodalModel, arguments: argparse.Namespace) -> Engine:
    from pipeline.server.engine import Engine
    from pipeline.serving.steps import StepModel

    steps = StepModel(model)
    tokens = arguments.cache_tokens or max(1, int(_free_bytes(model) // steps.bytes_per_token))
    return Engine(steps, batch=arguments.batch, queue=arguments.queue, cache_tokens=tokens)


def _free_bytes(model: MultimodalModel) -> float:
    import torch

    if model.device.type == "cuda":
        return _GPU_FRACTION * torch.cuda.mem_get_info(model.device)[0]
    return _RAM_FRACTION * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _announce(engine: Engine, name: str, address: tuple[str | int, ...], *, has_key: bool) -> None:
    host, port = str(address[0]), address[1]
    shown = f"[{host}]" if ":" in host else host
    policy = engine.steps.model.export_config.policy
    if not has_key and not ip_address(host).is_loopback:
        print(f"warning: no API key, so everyone who reaches {shown}:{port} may use the model", file=sys.stderr)
    print(
        f"serving {name} (mask {policy}, {engine.batch} requests at once, cache {engine.cache_tokens:,} tokens) "
        f"at http://{shown}:{port}",
        flush=True,
    )


def _key(file: str | None) -> str:
    """Return the API key, or nothing if none is set. Raises UserError for a key file that holds none."""
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip()
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--api-key-file {file} cannot be read: {error}") from error
    if not key or not key.isprintable() or " " in key:
        raise UserError(f"--api-key-file {file} must hold one key on one line")
    return key


def _image_rules(arguments: argparse.Namespace) -> ImageRules:
    from pipeline.server.images import ImageRules

    folder = None if arguments.images is None else Path(arguments.images)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    return ImageRules(
        folder=folder,
        hosts=tuple(arguments.image_hosts),
        max_images=arguments.max_images,
        max_bytes=arguments.max_image_mb << 20,
        max_pixels=arguments.max_megapixels * 1_000_000,
    )


def _chat(arguments: argparse.Namespace) -> None:
    from pipeline.server.engine import Engine
    from pipeline.server.sampling import Sampling
    from pipeline.server.terminal import Terminal
    from pipeline.serving.steps import StepModel

    engine = Engine(StepModel(load(arguments.model, arguments)), batch=1)
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    try:
        Terminal(engine, sampling, arguments.max_new_tokens, system=arguments.system).run()
    finally:
        engine.close()


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma serve``."""
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    parser.add_argument("--name", metavar="NAME", help="model name in requests (default: the folder's)")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"file with the API key (default: {KEY_VARIABLE})")
    parser.add_argument("--images", metavar="DIR", help="folder that file: URLs may read (default: none)")
    parser.add_argument(
        "--image-hosts", metavar="HOST", nargs="+", default=[], help="hosts to fetch image URLs from (default: none)"
    )
    for flag, default, text in (
        ("--batch", 16, "requests that run at once"),
        ("--queue", 64, "further requests that may wait; beyond them the answer is 429"),
        ("--max-new-tokens", 4096, "largest max_tokens of a request"),
        ("--max-images", 16, "images per request"),
        ("--max-image-mb", 20, "MiB of one encoded image"),
        ("--max-megapixels", 200, "megapixels of all images of a request"),
        ("--max-body-mb", 64, "MiB of a request"),
    ):
        parser.add_argument(flag, type=positive_int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--cache-tokens",
        type=positive_int,
        metavar="N",
        help="limit of the KV cache, padding included (default: what fits 80 %% of the free GPU memory, "
        "or half of the machine's memory)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to finish requests when stopped (default: 60)",
    )
    parser.set_defaults(command=_serve)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma chat``."""
    _add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system message (default: the template's)")
    parser.add_argument(
        "--temperature", type=number_between(0, 2), default=0.0, metavar="X", help="0: greedy (default: 0)"
    )
    parser.add_argument("--top-p", type=number_between(0.001, 1), default=1.0, metavar="X", help="nucleus (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling (default: random)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=512, metavar="N", help="limit of an answer (default: 512)"
    )
    parser.set_defaults(command=_chat)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder written by mma export, or a run folder (its newest checkpoint)"
    )
    add_verify(parser)
