"""Checks of arguments that several commands share, made before any work is done."""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_prep.common.errors import UserError


def existing_device(name: str) -> str:
    """Return the torch device that ``--device`` selects; ``auto`` is a GPU if there is one.

    Raises UserError for a name that is not ``cpu``, ``cuda`` or ``cuda:N``, or a GPU that torch does not see.
    """
    import torch  # help and mistyped arguments must not wait for it

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name, re.ASCII)
    if match is None:
        raise UserError(f"--device {name!r} is not a device: use cpu, cuda or cuda:N")
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise UserError(f"--device {name} does not exist, torch sees {gpus} GPUs here: use --device auto")
    return name


def check_output_file(flag: str, name: str) -> Path:
    """Return the path of a file that a command is to write, after checking that it can.

    Raises UserError naming ``flag`` for an empty name, a folder, a device, or a folder without write permission.
    """
    path = Path(name)
    if not name.strip():
        raise UserError(f"{flag} is empty: give a file name")
    if path.is_dir():
        raise UserError(f"{flag} {name} is a folder: give the name of a file to write")
    if path.exists() and not path.is_file():  # writing would replace it by a plain file
        raise UserError(f"{flag} {name} is a device or a pipe: give the name of a file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {name} cannot be written: {folder} is not a folder you may write to")
    return path
