"""``RUN/logs/rank-N.log``: a rank's warnings, errors with tracebacks, and stacks when the watchdog ends it."""

from __future__ import annotations

import logging
import os
import socket
import traceback
from pathlib import Path
from typing import IO

from pipeline.training.run.folder import RunFolder, timestamp
from pipeline.training.run.redact import redact

_LIBRARIES = ("DeepSpeed", "transformers")
"""Loggers that do not propagate to the root logger."""


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RankLog:
    """This rank's log file, and on rank 0 the console's warnings."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        """Open the file and send all warnings of this process to it. Raises OSError."""
        self.path: Path = folder.log_path(rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)
        self.stream.write(f"--- {timestamp()} rank {rank} on {socket.gethostname()}, pid {os.getpid()}\n")
        handler = logging.StreamHandler(self.stream)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in (None, *_LIBRARIES):
            logging.getLogger(name).addHandler(handler)
        if rank == 0:  # all ranks warn alike: show it once
            console = logging.StreamHandler()
            console.setLevel(logging.WARNING)
            console.setFormatter(_Plain("warning: %(message)s"))
            logging.getLogger().addHandler(console)
        logging.captureWarnings(True)

    def error(self, error: BaseException) -> None:
        """Write an error with its traceback."""
        self.stream.write(redact(f"{timestamp()} {''.join(traceback.format_exception(error))}"))
        self.stream.flush()
