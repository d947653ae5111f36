"""``mma mask`` and ``mma prove``: draw the mask of a row, and prove that it leaks no answer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from data_prep.common.command_line import OneLineParser
from data_prep.common.console import PipeConsole
from data_prep.common.errors import UserError
from pipeline.commands.arguments import check_output_file
from pipeline.masks.layout import EXAMPLE, LEGEND, layout_letters, parse_grid, parse_layout
from pipeline.masks.picture import draw_png, plain, terminal, terminal_legend
from pipeline.masks.policies import POLICIES, Policy, get_policy
from pipeline.masks.proof import Proof, prove
from pipeline.masks.sidecars import Sidecars

_SOURCE_HELP = f"a pack folder, or a layout such as '{EXAMPLE}': {LEGEND}"


def mask_command(argv: Sequence[str]) -> int:
    """Show masks in the terminal, or draw them side by side in a PNG; return the exit code.

    Raises UserError for a source, policy, grid or file that cannot be used.
    """
    options = mask_parser().parse_args(argv)
    policies = [part for policy in _policies(options, default=("causal", "mma")) for part in policy.parts]
    if options.out is not None and Path(check_output_file("--out", options.out)).suffix.lower() != ".png":
        raise UserError(f"--out {options.out}: the picture is a PNG; give a file name that ends in .png")
    [(_, sidecars)] = _rows(options.source, range(options.row, options.row + 1))
    letters = None if _is_folder(options.source) else layout_letters(options.source)
    if options.out is not None:
        draw_png(policies, sidecars, Path(options.out), letters)
        print(f"{options.out}: {', '.join(policy.name for policy in policies)} on {len(sidecars)} tokens")
    else:
        _print_masks(policies, sidecars, letters)
    return 0


def mask_parser() -> OneLineParser:
    """Return the parser of ``mma mask``."""
    parser = _parser(
        "mma mask",
        "Show which tokens of a packed row see which, and what each policy unlocks beyond causal attention.",
        f"  mma mask '{EXAMPLE}'\n  mma mask packs/sft --row 7 --policy causal --policy mma --out mask.png",
    )
    parser.add_argument("--row", type=int, default=0, metavar="N", help="row of the pack folder (default 0)")
    parser.add_argument("--out", metavar="FILE.png", help="write a PNG instead of printing")
    return parser


def _print_masks(policies: Sequence[Policy], sidecars: Sidecars, letters: str | None) -> None:
    """Print coloured blocks where stdout can show them, else ASCII signs."""
    console = PipeConsole()
    colours = console.color_system is not None and "utf" in console.encoding
    for policy in policies:
        if colours:
            console.print(terminal(policy, sidecars, console.width, letters))
        else:
            print(plain(policy, sidecars, console.width, letters))
    console.print(terminal_legend(colours=colours))


def prove_command(argv: Sequence[str]) -> int:
    """Prove policies on rows and print a table; return 0 if no answer leaks, else 1.

    Raises UserError for a source, policy or grid that cannot be used.
    """
    options = prove_parser().parse_args(argv)
    if options.rows < 1:
        raise UserError(f"--rows {options.rows}: give at least one row")
    policies = _policies(options, default=("mma",))
    rows = list(_rows(options.source, range(options.row, options.row + options.rows)))
    found = [(name, prove(policy, sidecars, options.layers)) for name, sidecars in rows for policy in policies]
    _print_proofs(policies, found, options.layers)
    return 0 if all(proof.leak_free for _, proof in found) else 1


def prove_parser() -> OneLineParser:
    """Return the parser of ``mma prove``."""
    parser = _parser(
        "mma prove",
        "Prove, on the layered attention graph of packed rows, that no prediction depends on the answer it is trained\n"
        "on, and that decoding with a KV cache gives the training states. Exits with 1 when an answer leaks.",
        f"  mma prove packs/sft --rows 100 --layers 32\n  mma prove '{EXAMPLE}' --policy mma --policy mma_unclamped",
    )
    parser.add_argument("--model", metavar="MODEL", help="probe a model instead; see mma prove --model MODEL --help")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="first row of the pack folder (default 0)")
    parser.add_argument("--rows", type=int, default=1, metavar="K", help="number of rows to prove (default 1)")
    parser.add_argument(
        "--layers", type=int, default=32, metavar="L", help="attention layers of the model (default 32)"
    )
    return parser


def _parser(program: str, description: str, examples: str) -> OneLineParser:
    listed = "\n".join(f"  {name:<22}{policy.summary}" for name, policy in POLICIES.items())
    parser = OneLineParser(
        prog=program,
        description=description,
        epilog=f"policies:\n{listed}\n\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help=_SOURCE_HELP)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="a policy, or one that changes with the layer (mma+0:8=mixed); may be repeated",
    )
    parser.add_argument("--grid", metavar="RxC", help="patches per image, such as 27x27, for policies that need a grid")
    parser.add_argument("--debug", action="store_true", help="print a traceback for errors")
    return parser


def _policies(options: argparse.Namespace, default: tuple[str, ...]) -> list[Policy]:
    grid = None if options.grid is None else parse_grid(options.grid)
    # Ablations that leak exist to be looked at; only training on them must be allowed explicitly.
    return [get_policy(name, allow_leak=True, grid=grid) for name in options.policy or default]


def _is_folder(source: str) -> bool:
    return bool(source) and Path(source).is_dir()


def _rows(source: str, wanted: range) -> Iterator[tuple[str, Sidecars]]:
    """Yield (name, sidecars) of the wanted rows of a pack folder, or of the row described by a layout."""
    if not _is_folder(source):
        if "/" in source:
            raise UserError(f"{source}: no such pack folder")
        yield "layout", parse_layout(source)
        return
    from data_prep.packs import PackReader

    reader = PackReader(Path(source))
    for row in (wanted[0], wanted[-1]):
        if not 0 <= row < len(reader):
            raise UserError(f"{source} has rows 0..{len(reader) - 1}, not {row}: change --row or --rows")
    for row in wanted:
        yield f"row {row}", Sidecars.from_row(reader[row])


def _print_proofs(policies: Sequence[Policy], found: Sequence[tuple[str, Proof]], layers: int) -> None:
    table = Table(title=f"{layers} layers of attention")
    for column in ("policy", "rows", "targets", "leak-free", "KV-exact", "first fault"):
        table.add_column(column, justify="right" if column in ("rows", "targets") else "left")
    for policy in policies:
        proofs = [(name, proof) for name, proof in found if proof.policy == policy.name]
        faults = [f"{name}: {proof.leak or proof.inexact}" for name, proof in proofs if proof.leak or proof.inexact]
        table.add_row(
            policy.name,
            str(len(proofs)),
            str(sum(proof.targets for _, proof in proofs)),
            _yes_or_no(all(proof.leak_free for _, proof in proofs)),
            _yes_or_no(all(proof.kv_exact for _, proof in proofs)),
            faults[0] if faults else "",
        )
    PipeConsole().print(table)


def _yes_or_no(holds: bool) -> str:
    return "[green]yes[/green]" if holds else "[red]no[/red]"
