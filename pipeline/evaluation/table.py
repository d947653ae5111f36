"""Scores as a table beside the paper's Table 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipeline.evaluation.registry import PAPER
from pipeline.evaluation.result import Difference, Result

SOURCE = "Table 1 of arXiv 2503.02597"
_COLUMNS = tuple(one.name for one in PAPER)
_TABLE_1: Mapping[str, Sequence[float]] = {
    "causal": (1226.3, 258.2, 64.9, 64.1, 47.0, 31.1, 24.2, 79.8, 24.3, 50.6, 45.2, 54.3),
    "CCA": (1212.7, 243.6, 67.4, 65.3, 54.0, 34.6, 25.6, 81.9, 29.0, 52.7, 56.0, 62.8),
    "DOT": (1267.8, 251.4, 43.8, 54.7, 47.5, 30.7, 25.6, 82.7, 25.0, 50.5, 52.2, 58.1),
    "MMA": (1363.7, 315.4, 71.8, 67.1, 59.6, 37.3, 26.4, 82.7, 30.2, 52.3, 57.8, 64.1),
    "AKI-4B": (1491.9, 362.9, 73.1, 69.4, 74.6, 38.7, 32.1, 86.9, 40.8, 58.9, 62.1, 71.8),
}
"""Rows of the paper's table, in the order of ``registry.PAPER``."""
_BESIDE_TWO = ("causal", "MMA", "AKI-4B")
"""Rows shown beside two models, where the terminal has less room."""


def paper_score(row: str, benchmark: str) -> float | None:
    """Return the paper's score, or None for a benchmark outside its table."""
    return _TABLE_1[row][_COLUMNS.index(benchmark)] if benchmark in _COLUMNS else None


@dataclass(frozen=True)
class Line:
    """One benchmark of the table: the model's result, and that of the model it is compared with."""

    result: Result
    other: Result | None = None
    difference: Difference | None = None


def show(lines: Sequence[Line], models: Sequence[str], skipped: Mapping[str, str], console: Console) -> None:
    """Print the table, what was skipped and why, and what the numbers do not say.

    Args:
        lines: one per benchmark.
        models: name of the model, and of the one it is compared with.
        skipped: the reason for each benchmark left out.
        console: where to print.
    """
    rows = _BESIDE_TWO if len(models) > 1 else tuple(_TABLE_1)
    table = Table(title="benchmark scores", title_justify="left")
    table.add_column("benchmark", no_wrap=True)
    table.add_column("score", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    if len(models) > 1:
        table.add_column("difference\n95 % interval", justify="right", no_wrap=True)
    for name in rows:
        table.add_column(f"paper\n{name}", justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*_cells(line, rows))
    console.print(table)
    for note in _notes(lines, skipped):
        console.print(note)


def _cells(line: Line, rows: Sequence[str]) -> list[str]:
    result, name = line.result, line.result.benchmark.name
    cells = [name, next(iter(result.scores)), str(len(result.graded)), f"{result.headline:.1f}"]
    if line.other and line.difference:
        one = line.difference
        cells += [f"{line.other.headline:.1f}", f"{one.value:+.1f}\n{one.low:+.1f} to {one.high:+.1f}"]
    return [*cells, *("-" if (paper := paper_score(row, name)) is None else f"{paper:.1f}" for row in rows)]


def _notes(lines: Sequence[Line], skipped: Mapping[str, str]) -> Iterator[str]:
    if any(line.result.benchmark.in_table for line in lines):
        yield f"paper: {SOURCE}; its prompts, judge and toolkit may differ from those of this run"
    for line in lines:
        name = line.result.benchmark.name
        if line.result.judge:
            yield f"{name}: judged by {line.result.judge.model}"
        for result in filter(None, (line.result, line.other)):
            if result.unanswerable:
                yield (
                    f"{name}: {result.unanswerable} of {len(result.graded)} prompts exceed the model's positions; they "
                    "are scored as empty answers"
                )
    if any(line.result.limit for line in lines):
        yield "only the first questions were asked (--limit): these are no benchmark scores"
    yield from (f"skipped {name}: {reason}" for name, reason in skipped.items())
