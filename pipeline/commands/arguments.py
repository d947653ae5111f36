"""Checks of arguments that several commands share, made before any work is done."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from data_prep.common.command_line import output_problem
from data_prep.common.errors import UserError, short_repr


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
        raise UserError(f"--device {short_repr(name)} is not a device: use cpu, cuda or cuda:N")
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise UserError(f"--device {name} does not exist, torch sees {gpus} GPUs here: use --device auto")
    return name


def check_output_file(flag: str, name: str) -> Path:
    """Return the path of a file that a command is to write, after checking that it can.

    Raises UserError naming ``flag`` for an empty name, a folder, a device, or a folder without write permission.
    """
    problem = output_problem(name)
    if problem:
        raise UserError(f"{flag} {problem}")
    return Path(name)


def number_between(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse ``type`` that parses a number of this range, both ends included; nan is refused."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return number
