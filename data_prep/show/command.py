"""``inspect``, shared by ``mma-prep inspect`` and ``mma inspect``, which adds masks to the page.

Heavy libraries are imported inside the functions, so help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import folder_path, output_file

if TYPE_CHECKING:
    from data_prep.show.page import Masks


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the choice of rows and ``--html``."""
    parser.add_argument(
        "directory", type=folder_path, metavar="DIR", help="a pack folder, or an output folder with only one"
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--row", default="", metavar="N", help="row number, from 0 (default: 0; on a page: rows spread evenly)"
    )
    rows.add_argument("--rows", default="", metavar="A:B", help="rows A to B - 1, or one row")
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="write an HTML page to browse instead of printing"
    )


def inspect_packs(options: argparse.Namespace, masks: Masks | None = None) -> None:
    """Print rows, or write the page if ``--html`` was given; ``masks`` draws them on the page. Raises UserError."""
    wanted: str = options.row or options.rows
    html: Path | None = options.html
    if html is None:
        from data_prep.show.inspect import show_rows

        show_rows(options.directory, wanted or "0")
    else:
        from data_prep.show.page import write_inspect_page

        print(write_inspect_page(options.directory, html, wanted, masks))
