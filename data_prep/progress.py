"""Progress output: a live bar on a terminal, plain lines in logs, nothing if another process reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data_prep.common.events import EVENTS_FILE, EventLedger, describe_events
from data_prep.quarantine import Tally, add_tallies

_LINE_EVERY_S = 5.0


class Task:
    """Progress of one step over its items."""

    def __init__(self, label: str, total: int, show: Callable[[Task], None]) -> None:
        self.label, self.total, self._show = label, total, show
        self.done = 0
        self.tally = Tally()
        self.start = time.monotonic()

    def advance(self, tally: Tally | None = None) -> None:
        """Count one item as done, with the tally of its samples if it is known."""
        self.done += 1
        if tally is not None:
            self.tally = add_tallies([self.tally, tally])
        self._show(self)

    @property
    def detail(self) -> str:
        """``1,200 samples, 3 rejected`` for steps that read samples."""
        if not self.tally.seen:
            return ""
        return f"{self.tally.seen:,} samples, {self.tally.rejected:,} rejected"

    @property
    def eta_s(self) -> float:
        """Estimated seconds left at the current rate."""
        return (time.monotonic() - self.start) * (self.total - self.done) / max(1, self.done)


class Reporter:
    """Writes progress to ``stream``; ``quiet`` suppresses all output; events in ``strict`` are fatal."""

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, strict: frozenset[str] = frozenset()
    ) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._strict = strict
        self._ledgers: dict[Path, EventLedger] = {}

    def events(self, out: Path) -> EventLedger:
        """Return the event ledger of an output folder; only one process of a team may record into it."""
        if out not in self._ledgers:
            self._ledgers[out] = EventLedger(out / EVENTS_FILE, self._strict)
        return self._ledgers[out]

    def say_events(self) -> None:
        """Write one line for the events of this command, if there were any."""
        for ledger in self._ledgers.values():
            if ledger.recorded:
                self.say(f"events: {describe_events(ledger.recorded)}; see {ledger.path}")

    def say(self, line: str) -> None:
        """Write one line."""
        if not self._quiet:
            print(line, file=self._stream, flush=True)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Show the progress of a step over ``total`` items."""
        if self._quiet or not total:
            yield Task(label, total, lambda task: None)
        elif self._stream.isatty():
            yield from self._bar(label, total)
        else:
            yield from self._lines(label, total)

    def _lines(self, label: str, total: int) -> Iterator[Task]:
        last = time.monotonic()

        def show(task: Task) -> None:
            nonlocal last
            if task.done == task.total or time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                words = [f"{label}: {task.done}/{task.total}", task.detail, f"eta {task.eta_s:.0f} s"]
                self.say("  ".join(word for word in words if word))

        yield Task(label, total, show)

    def _bar(self, label: str, total: int) -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        detail = TextColumn("{task.fields[detail]}", markup=False)
        with Progress(*columns, detail, console=Console(file=self._stream)) as bar:
            row = bar.add_task(label, total=total, detail="")
            yield Task(label, total, lambda task: bar.update(row, completed=task.done, detail=task.detail))
