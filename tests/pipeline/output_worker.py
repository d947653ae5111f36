"""Runs ``mma`` commands with awkward outputs, each in a fork of one process that has imported everything.

Reads a JSON list of ``[words, output]`` on stdin and prints a JSON list of ``[exit code, stderr]``. ``output`` is
``closed``, ``ascii``, ``full`` (/dev/full) or ``gone`` (a pipe that nobody reads).
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from pipeline.cli import main
from pipeline.parallel.launch import configure_libraries


def preload() -> None:
    """Import what the commands import, and leave out the one check that starts processes."""
    configure_libraries()  # before DeepSpeed is imported
    from pipeline.commands import doctor, estimate, schedule, status  # noqa: F401

    doctor.check_local_network = lambda: iter(())


def run(words: Sequence[str], output: str) -> tuple[int, str]:
    """Return the exit code and the errors of one command."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            os._exit(be_command(words, output, errors.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return code, errors.read()


def be_command(words: Sequence[str], output: str, errors: int) -> int:
    """Run a command as the interpreter would: with this stdout, flushed at the end."""
    os.dup2(errors, 2)
    if output == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]  # as Python starts without a file 1
    else:
        os.dup2(open_output(output), 1)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="ascii" if output == "ascii" else "utf-8")
    try:
        code = main(words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    return code


def open_output(output: str) -> int:
    """Return a file descriptor."""
    if output == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open("/dev/full" if output == "full" else os.devnull, os.O_WRONLY)


if __name__ == "__main__":
    preload()
    print(json.dumps([run(words, output) for words, output in json.load(sys.stdin)]))
