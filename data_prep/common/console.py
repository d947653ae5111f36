"""The terminal of commands that print tables and colours."""

from __future__ import annotations

from rich.console import Console


class PipeConsole(Console):
    """A console that reports a closed pipe as ``print`` does; Rich's own exits with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that Rich has caught."""
        raise BrokenPipeError
