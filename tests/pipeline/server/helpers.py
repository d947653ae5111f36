"""A served model: a tiny export, a real `mma serve` process, and what its clients ask."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.example import ImageRef, Turn
from tests.launch import environment
from tests.pipeline.serving.helpers import make_export

POSITIONS = 8192
"""Room for an answer that takes seconds."""


def make_model(folder: Path) -> Path:
    """A random model with many positions."""
    return make_export(folder, max_position_embeddings=POSITIONS)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def stop(self, sig: int = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@contextmanager
def served(model: Path, *flags: str, **variables: str) -> Iterator[Served]:
    """Start `mma serve` on a free port, and end it."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", str(model), "--port", "0", "--device", "cpu", *flags]
    with subprocess.Popen(
        command, env=environment(variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            assert " at http://" in line, process.stderr.read()
            yield Served(line.split()[-1], process)
        finally:
            if process.poll() is None:
                process.kill()


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation as the API takes it."""
    return [
        {
            "role": turn.role,
            "content": turn.parts[0]
            if turn.role != "user"
            else [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": data_url(part)}}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def data_url(image: ImageRef) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read()).decode()}"


def eventually(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
