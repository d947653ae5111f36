"""``mma inspect``: the same command as ``mma-prep inspect``, with the mask of every row on the page.

Data preparation runs without torch and cannot draw masks, so its page takes the drawing function as an argument.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_prep.common.command_line import OneLineParser
from data_prep.packs import PackRow
from data_prep.show.command import add_inspect_arguments, inspect_packs
from data_prep.show.page import Masks
from pipeline.masks.layout import parse_grid
from pipeline.masks.picture import thumbnail
from pipeline.masks.policies import POLICIES, get_policy
from pipeline.masks.sidecars import Sidecars

_THUMBNAIL_PX = 480


def inspect_command(argv: Sequence[str]) -> int:
    """Print rows or write the page; return the exit code.

    Raises UserError for a folder or row that does not exist, a grid that does not fit, or an unwritable page.
    """
    options = inspect_parser().parse_args(argv)
    # Ablations that leak exist to be looked at; only training on them must be allowed explicitly.
    grid = None if options.grid is None else parse_grid(options.grid)
    policy = get_policy(options.policy, allow_leak=True, grid=grid)

    def draw(row: PackRow) -> bytes:
        return thumbnail(policy, Sidecars.from_row(row), _THUMBNAIL_PX)

    caption = f"{policy.name}: each row of pixels is a token and the tokens it sees; orange: beyond causal"
    inspect_packs(options, Masks(draw, caption))
    return 0


def inspect_parser() -> OneLineParser:
    """Return the parser of ``mma inspect``."""
    parser = OneLineParser(
        prog="mma inspect",
        description="Show packed rows, decoded: in the terminal, or on one HTML page with their images and masks.",
        epilog="example:\n  mma inspect data/demo/packs/sft --rows 100:140 --html rows.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inspect_arguments(parser)
    parser.add_argument("--policy", default="mma", choices=POLICIES, help="policy of the masks (default: %(default)s)")
    parser.add_argument("--grid", metavar="RxC", help="patches per image, such as 27x27; required by --policy cca")
    parser.add_argument("--debug", action="store_true", help="print a traceback for errors")
    return parser
