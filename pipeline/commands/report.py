"""``mma report``: one page about one or several runs."""

from __future__ import annotations

import argparse

from pipeline.commands.arguments import check_output_file
from pipeline.report.page import write_report


def report(options: argparse.Namespace) -> int:
    """Write the page and print its path; return 0. Raises UserError for a folder that is no run."""
    out = check_output_file("--out", str(options.out or options.runs[0] / "report.html"))
    size = write_report(options.runs, out, options.packs, pictures=options.look)
    print(f"{out}: {size / 1000:,.0f} kB, open it in a browser; nothing in it loads from a network")
    return 0
