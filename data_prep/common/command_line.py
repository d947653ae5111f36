"""Command-line parser that reports a mistake in one line with a suggestion."""

from __future__ import annotations

import argparse
import io
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from data_prep.common.errors import did_you_mean


def positive_int(text: str) -> int:
    """Parse a whole number above 0; an argparse ``type``."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line without the usage; the exit code is 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but check the command name first."""
        words = list(sys.argv[1:] if args is None else args)
        known = self._commands()
        if known and words and not words[0].startswith("-") and words[0] not in known:
            self.error(f"unknown command '{words[0]}'{did_you_mean(words[0], known)}; known: {', '.join(known)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        flag = word.partition("=")[0]
        hint = did_you_mean(word, self.flags()) if word.startswith("-") else ""
        if message.startswith("unrecognized"):
            owners = [name for name, command in self._commands().items() if flag in command.flags()]
            hint = f" ({flag} is for {', '.join(owners)})" if owners else hint
        self.exit(2, f"{self.prog.split()[0]}: {message}{hint}; {self.prog} --help shows all\n")

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


def use_any_output() -> None:
    """Make ``print`` work whatever stdout is: closed (output is dropped), or an encoding that lacks a character."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_output(*, discard: bool = False) -> None:
    """Write out what was printed. Raises OSError if it cannot be written.

    ``discard`` drops it instead, so the interpreter does not fail a second time when it exits.
    """
    if not discard:
        sys.stdout.flush()
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
