"""Scores as a table beside the paper's Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def paper_score(row: str, benchmark: str) -> float | None:
    """Return the paper's score, or None for a benchmark outside its table."""
    return _TABLE_1[row][_COLUMNS.index(benchmark)] if benchmark in _COLUMNS else None


@dataclass(frozen=True)
class Line:
    """One benchmark of the table: the model's result, and that of the model it is compared with."""

    result: Result
    other: Result | None = None
    difference: Difference | None = None


def show(lines: Sequence[Line], model: str, other: str | None, skipped: Mapping[str, str], console: Console) -> None:
    """Print the table, what was skipped and why, and what the numbers do not say."""
    table = Table(title="benchmark scores", title_justify="left")
    for name in ("benchmark", "questions"):
        table.add_column(name, justify="left" if name == "benchmark" else "right")
    compared = [other, "difference (95 %)"] if other else []
    for name in (model, *compared, *_TABLE_1):
        table.add_column(name, justify="right", overflow="fold")
    for line in lines:
        table.add_row(*_cells(line))
    console.print(table)
    console.print(f"columns {', '.join(_TABLE_1)}: {SOURCE}, whose prompts, judge and toolkit may differ from these")
    for line in lines:
        console.print(f"{line.result.benchmark.name}: {_conditions(line.result)}")
        for result in (line.result, *([line.other] if line.other else [])):
            if result.unanswerable:
                console.print(
                    f"{line.result.benchmark.name}: {result.unanswerable} of {len(result.graded)} prompts exceed a "
                    "model's positions and are scored as empty answers"
                )
    if any(line.result.limit for line in lines):
        console.print("only the first questions were asked (--limit): these are no benchmark scores")
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}")


def _cells(line: Line) -> list[str]:
    name = line.result.benchmark.name
    cells = [name, str(len(line.result.graded)), f"{line.result.headline:.1f}"]
    if line.other and line.difference:
        one = line.difference
        cells += [f"{line.other.headline:.1f}", f"{one.value:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"]
    return [*cells, *("-" if (paper := paper_score(row, name)) is None else f"{paper:g}" for row in _TABLE_1)]


def _conditions(result: Result) -> str:
    judge = f"; judge: {result.judge.model}" if result.judge else ""
    one = result.benchmark
    return f"{next(iter(result.scores))}; prompt: {one.prompt}; answer: {one.metric.extractor}{judge}"
