"""Command lines whose mistakes are one line, whatever stdout is: a pipe that closes, a full disk, ASCII, nothing."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TextIO

from data_prep.common.errors import UserError, did_you_mean, short_repr

_SHOWN_CHARACTERS = 1000


def positive_int(text: str) -> int:
    """Parse a whole number above 0; an argparse ``type``."""
    if not text.isdecimal() or len(text) > 18 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is not a whole number above 0")
    return int(text)


def folder_path(text: str) -> Path:
    """Parse the path of a folder; an argparse ``type``. An empty path (an unset shell variable) is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty: give a folder (. for the working folder)")
    return Path(text)


def output_file(text: str) -> Path:
    """Parse the path of a file to write, after checking that it can be; an argparse ``type``."""
    problem = output_problem(text)
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return Path(text)


def output_problem(name: str) -> str:
    """Return why no file can be written at a path: no name, a folder, a device, no permission; empty if it can."""
    path, shown = Path(name), _short(name)
    if not name.strip():
        return "is empty: give a file name"
    try:
        if path.is_dir() or name.endswith(os.sep):
            return f"{shown} is a folder: give the name of a file to write"
        if path.exists() and not path.is_file():  # writing would replace it by a plain file
            return f"{shown} is a device or a pipe: give the name of a file to write"
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        return f"{shown} cannot be written: {error.strerror}"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return f"{shown} cannot be written: {folder} is not a folder you may write to"
    return ""


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that prints one line instead of its usage, and exits with code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but check the command first."""
        words = list(sys.argv[1:] if args is None else args)
        known = self._commands()
        if known and words and not words[0].startswith("-") and words[0] not in known:
            command = _short(words[0])
            self.error(f"unknown command {command!r}{did_you_mean(command, known)}; known: {', '.join(known)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        word = next(iter(message.removeprefix("unrecognized arguments: ").split()), "")
        flag = word.partition("=")[0]
        hint = did_you_mean(_short(word), self.flags()) if word.startswith("-") else ""
        if message.startswith("unrecognized"):
            owners = [name for name, command in self._commands().items() if flag in command.flags()]
            hint = f" ({flag} is for {', '.join(owners)})" if owners else hint
        shown = _short(" ".join(message.split()))
        self.exit(2, f"{self.prog.split()[0]}: {shown}{hint}; {self.prog} --help shows all\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help and errors; argparse would ignore that a disk is full."""
        if message:
            (file or sys.stderr).write(message)

    def flags(self) -> set[str]:
        """Return the flags of all commands."""
        return set(self._option_string_actions).union(*(parser.flags() for parser in self._commands().values()))

    def _commands(self) -> dict[str, OneLineParser]:
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``."""
    try:
        number = version("mma-pipeline")
    except PackageNotFoundError:
        number = "(not installed)"
    parser.add_argument("--version", action="version", version=f"{parser.prog} {number}")


def print_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    """Print a completion script of all commands of a parser for ``bash``, ``zsh`` or ``tcsh``."""
    import shtab  # only this command needs it

    print(shtab.complete(parser, shell=shell))


def run_command(program: str, work: Callable[[], int], *, debug: bool, stopped: str = "stopped") -> int:
    """Run a command so that every failure the user can act on is one line on stderr.

    Args:
        program: name that begins the line.
        work: parses the command line and does the work; returns the exit code.
        debug: show the traceback of an error as well.
        stopped: what to print on Ctrl-C.

    Returns:
        The exit code: that of ``work``, 0 if the reader of stdout closed it (``| head``), 2 for a user error or an
        error of the operating system (no permission, disk full), 130 for Ctrl-C.
    """
    prepare_streams()
    try:
        try:
            code = work()
        finally:  # also after --help, which exits; a full disk is an error of this command
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return 0
    except (UserError, OSError) as error:
        if debug:
            _print_to_stderr(traceback.format_exc().rstrip())
        _print_to_stderr("\n".join(_short(line) for line in f"{program}: {error}".split("\n")))
        code = 2
    except KeyboardInterrupt:
        _print_to_stderr(f"{program}: {stopped}")
        code = 130
    finally:
        for stream in (sys.stdout, sys.stderr):  # at exit, Python would fail to flush them, with a traceback
            _flush_or_discard(stream)
    return code


def prepare_streams() -> None:
    """Give the process a stdout and a stderr that take any text, also where they are closed or know ASCII only."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`): the next file that is opened would get its number, and the output
            with suppress(OSError):
                _open_null(descriptor)
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - stays open
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _print_to_stderr(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _flush_or_discard(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):  # ValueError: closed
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send what is left in a stream's buffer to nowhere."""
    with suppress(OSError, ValueError):
        _open_null(stream.fileno())


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
