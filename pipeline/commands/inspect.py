"""``mma inspect``: the page of ``mma-prep inspect --html`` plus the mask of every row.

Data preparation runs without torch and cannot draw masks, so its page takes the drawing function as an argument.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.common.command_line import OneLineParser
from data_prep.packs import PackRow
from data_prep.show.page import Masks, write_inspect_page
from pipeline.masks.picture import thumbnail
from pipeline.masks.policies import POLICIES, get_policy
from pipeline.masks.sidecars import Sidecars

_THUMBNAIL_PX = 480


def inspect_command(argv: Sequence[str]) -> int:
    """Write the page; returns the exit code. Raises UserError for a folder, row or policy that does not exist."""
    parser = OneLineParser(
        prog="mma inspect",
        description="Write packed rows, decoded, with images and masks, into one HTML page to browse.",
        epilog="example:\n  mma inspect data/demo/packs/sft --rows 100:140 --html rows.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a pack folder")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page")
    parser.add_argument("--rows", default="", metavar="A:B", help="rows A to B - 1, or one (default: some, evenly)")
    # Ablations that leak are there to be looked at; policies that need an image grid are drawn by mma mask --grid.
    drawable = [name for name, policy in POLICIES.items() if not policy.needs_grid]
    parser.add_argument("--policy", default="mma", choices=drawable, help="whose masks (default: %(default)s)")
    options = parser.parse_args(argv)
    policy = get_policy(options.policy, allow_leak=True)

    def draw(row: PackRow) -> bytes:
        return thumbnail(policy, Sidecars.from_row(row), _THUMBNAIL_PX)

    caption = f"{policy.name}: which token (down) sees which (across); orange is beyond causal"
    print(write_inspect_page(options.directory, options.html, options.rows, Masks(draw, caption)))
    return 0
