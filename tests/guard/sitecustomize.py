"""Keeps every Python process of the tests away from ``runs/`` and ``data/`` of the checkout, where a user's work is.

Python imports a module of this name at its start; ``tests/conftest.py`` puts this folder on PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
_PRIVATE = tuple(os.path.join(_ROOT, name) for name in ("runs", "data"))  # noqa: PTH118
_EVENTS = frozenset({"open", "os.listdir", "os.scandir", "os.mkdir"})


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    text = os.fsdecode(arguments[0])
    if "runs" not in text and "data" not in text:
        return
    beside = arguments[-1] != -1 if event == "os.mkdir" else event == "open" and arguments[1] is None
    if beside and not os.path.isabs(text):  # noqa: PTH117
        return  # os.open and os.mkdir may name a file relative to an open folder
    path = os.path.abspath(text)  # noqa: PTH100
    if path in _PRIVATE or path.startswith(tuple(f"{folder}{os.sep}" for folder in _PRIVATE)):
        raise RuntimeError(f"a test must not use {path}, which belongs to the user of this checkout")


sys.addaudithook(_refuse)
