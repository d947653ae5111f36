"""``mma prove --model``: run a model on a few batches and report leaks and other mask faults."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.common.command_line import OneLineParser, positive_int
from pipeline.prober import Report, probe
from pipeline.prober.load import LAYOUT, load
from pipeline.prober.report import CHECKS

_EXAMPLES = f"""\
examples:
  mma prove --model models/demo --batches data/demo/packs/sft
  mma prove --model my_text_model --batches '{LAYOUT}'
  mma prove --model my_training:model --batches my_training:batches
"""
_COLOURS = {"FOUND": "red", "ok": "green", "skipped": "yellow"}


def probe_command(argv: Sequence[str]) -> int:
    """Probe a model and print a table; returns 0 when nothing is found, else 1.

    Raises UserError for anything that cannot be loaded or run.
    """
    parser = OneLineParser(
        prog="mma prove",
        description="Run a model on a few batches and report answer leaks, cross-sample leaks and other mask faults.\n"
        "Exits with 1 when something is found.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a transformers folder, an export of this project, or module:function"
    )
    parser.add_argument("--batches", help="module:function, a pack folder (for an export), or a layout (for text)")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="first row of the pack folder (default 0)")
    parser.add_argument("--rows", type=positive_int, default=1, metavar="K", help="number of rows (default 1)")
    parser.add_argument("--debug", action="store_true", help="print a traceback for errors")
    options = parser.parse_args(argv)
    model, batches = load(options.model, options.batches, range(options.row, options.row + options.rows))
    started = time.perf_counter()
    report = probe(model, batches)
    _print(report, options.model, time.perf_counter() - started)
    return 0 if report.ok else 1


def _print(report: Report, model: str, seconds: float) -> None:
    table = Table(title=f"{escape(model)}, probed in {seconds:.1f} s", title_justify="left")
    for column in ("check", "result", "details"):
        table.add_column(column, no_wrap=column != "details")
    for check in CHECKS:
        result = report.result(check)
        table.add_row(check, f"[{_COLOURS[result]}]{result}[/]", escape(report.details(check)))
    Console().print(table)
