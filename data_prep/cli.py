"""``mma-prep``: raw corpora -> packs.

Heavy libraries are imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import OneLineParser, add_version, print_completion
from data_prep.common.errors import UserError
from data_prep.init.flags import add_commands

if TYPE_CHECKING:
    from data_prep.common.workers import Team
    from data_prep.progress import Reporter
    from data_prep.recipe import Recipe

_OVERVIEW = """\
Turn raw image-text corpora into packed rows for training.

  raw shards --ingest--> tokens + images --plan--> order of rows --materialize--> packs

Every step continues where it was stopped, and does only what changed. The result is the
same to the byte for any number of workers.
"""
_EXAMPLES = """\
examples:
  mma-prep init my_data/                      look at your own data and write a recipe for it
  mma-prep demo data/demo                     draw a small world and pack it (under a minute)
  mma-prep run nlvr --out data/nlvr           all steps of a shipped recipe
  mma-prep run my_recipe.yaml --workers 16    all steps of your own
  mma-prep inspect data/demo/packs/sft --row 3
  mma-prep inspect data/demo/packs/sft --html rows.html
  mma-prep rejects data/demo                  what could not be used, and why
  mma-prep plan my_recipe.yaml --suggest-seq-len
  mma-prep verify data/demo                   hash everything

on a cluster:
  mpiexec -n 64 python -m mpi4py -m data_prep ingest RECIPE
  mma-prep ingest RECIPE --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
  mma-prep plan RECIPE && mma-prep materialize RECIPE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 and one line for what the user can mend, 130 for Ctrl-C)."""
    arguments = build_parser().parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except BrokenPipeError:  # `mma-prep inspect ... | head`
        sys.stderr.close()
    except (UserError, OSError) as error:  # OSError: no permission, disk full, file gone
        if arguments.debug:
            traceback.print_exc()
        print(f"mma-prep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mma-prep: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``mma-prep`` with all of its commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("mma-prep", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw)
    add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    debug = OneLineParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    work = OneLineParser(add_help=False, parents=[debug])
    work.add_argument("--workers", type=int, metavar="N", help="local processes (default: one per core)")
    recipe = OneLineParser(add_help=False, parents=[work])
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    recipe.add_argument("--out", metavar="DIR", help="output folder (default: the recipe's)")
    recipe.add_argument("--root", metavar="DIR", help="raw data folder (default: the recipe's)")
    share = OneLineParser(add_help=False, parents=[recipe])
    share.add_argument("--shard", metavar="I/N", help="do share I of N (a Slurm array's task)")
    folder = OneLineParser(add_help=False, parents=[debug])
    folder.add_argument("directory", type=Path, metavar="DIR", help="a pack folder, or an output folder with several")

    demo = commands.add_parser("demo", parents=[work], help="draw a small world and pack it")
    demo.add_argument("out", type=Path, metavar="OUT", help="output folder")
    demo.add_argument("--scenes", type=int, default=20_000, metavar="N", help="scenes to draw (default: %(default)s)")
    demo.add_argument("--held-out", type=int, default=600, metavar="N", help="held-out scenes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    demo.set_defaults(command=_demo)
    for name, parent, command, text in (
        ("run", recipe, _run, "all steps: ingest, plan, materialize"),
        ("ingest", share, _ingest, "step 1: tokenise samples and gather images"),
        ("plan", recipe, _plan, "step 2: blend, order and pack; writes an index only"),
        ("materialize", share, _materialize, "step 3: write the packs"),
        ("verify", folder, _verify, "hash every file of packs, image store, tokenizer, ingest and rejects; not .work"),
        ("stats", folder, _stats, "corpora, lengths and packing efficiency"),
    ):
        commands.add_parser(name, parents=[parent], help=text, description=text).set_defaults(command=command)
    commands.choices["plan"].add_argument(
        "--suggest-seq-len", action="store_true", help="print how full rows of other lengths would be; plan nothing"
    )
    inspect = commands.add_parser("inspect", parents=[folder], help="show packed rows, decoded")
    rows = inspect.add_mutually_exclusive_group()
    rows.add_argument("--row", default="", metavar="N", help="row number from 0 (default: 0; of a page: some, evenly)")
    rows.add_argument("--rows", default="", metavar="A:B", help="rows A to B - 1")
    inspect.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to browse instead (with masks: mma inspect)"
    )
    inspect.set_defaults(command=_inspect)
    text = "what was rejected, why, and examples"
    rejects = commands.add_parser("rejects", parents=[debug], help=text, description=text)
    rejects.add_argument("directory", type=Path, metavar="DIR", help="an output folder")
    rejects.add_argument("--html", type=Path, metavar="FILE", help="write a page with images instead")
    rejects.set_defaults(command=_rejects)
    completion = commands.add_parser("completion", parents=[debug], help="print a shell completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete in")
    completion.set_defaults(command=lambda options: print_completion(build_parser(), options.shell))
    add_commands(commands, debug)
    return parser


def _load(arguments: argparse.Namespace) -> Recipe:
    from data_prep.recipe import load_recipe

    overrides = {key: getattr(arguments, key) for key in ("out", "root") if getattr(arguments, key) is not None}
    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.recipe == "demo" and not recipe.root_dir.is_dir():
        raise UserError(f"the demo is not drawn yet: `mma-prep demo {recipe.out_dir}` draws it and makes its packs")
    return recipe


def _with_team(arguments: argparse.Namespace, work: Callable[[Team, Reporter], object]) -> None:
    """Run work with the processes the user asked for; only one process of a team reports."""
    from data_prep.common.workers import form_team
    from data_prep.progress import Reporter

    reporter = Reporter()
    team = form_team(arguments.workers, getattr(arguments, "shard", None), reporter.say)
    if team is not None:
        work(team, Reporter(quiet=not team.is_reporter))


def _with_recipe(arguments: argparse.Namespace, work: Callable[[Recipe, Team, Reporter], object]) -> None:
    """Run work on a recipe, while no other process writes to its output folder; shares of one step may."""
    from data_prep.ingest.workspace import lock_of

    recipe = _load(arguments)

    def alone(team: Team, reporter: Reporter) -> None:
        with ExitStack() as held:

            def take() -> None:  # what it returned would be sent to the other ranks
                held.enter_context(lock_of(recipe.out_dir).hold(reporter.say, shared=not team.covers_all))

            team.serial(take)
            work(recipe, team, reporter)

    _with_team(arguments, alone)


def _demo(arguments: argparse.Namespace) -> None:
    from data_prep.demo.packs import Demo, make_demo

    demo = Demo(arguments.scenes, arguments.held_out, arguments.seed)
    _with_team(arguments, lambda team, reporter: make_demo(arguments.out, demo, team, reporter))


def _run(arguments: argparse.Namespace) -> None:
    from data_prep.steps import run

    _with_recipe(arguments, run)


def _ingest(arguments: argparse.Namespace) -> None:
    from data_prep.ingest.step import ingest

    _with_recipe(arguments, ingest)


def _plan(arguments: argparse.Namespace) -> None:
    from data_prep.planning.step import plan, seq_lens_by_efficiency

    def suggest(recipe: Recipe) -> None:
        from data_prep.show.stats import show_lengths

        show_lengths({name: pack.seq_len for name, pack in recipe.packs.items()}, seq_lens_by_efficiency(recipe))

    def step(recipe: Recipe, team: Team, reporter: Reporter) -> None:
        team.serial(lambda: suggest(recipe) if arguments.suggest_seq_len else plan(recipe, reporter))

    _with_recipe(arguments, step)


def _materialize(arguments: argparse.Namespace) -> None:
    from data_prep.materialize import materialize

    _with_recipe(arguments, materialize)


def _verify(arguments: argparse.Namespace) -> None:
    from data_prep.verify import verify

    for line in verify(arguments.directory):
        print(line, flush=True)


def _stats(arguments: argparse.Namespace) -> None:
    from data_prep.show.stats import show_stats

    show_stats(arguments.directory)


def _inspect(arguments: argparse.Namespace) -> None:
    wanted = arguments.row or arguments.rows
    if arguments.html is not None:
        from data_prep.show.page import write_inspect_page

        print(write_inspect_page(arguments.directory, arguments.html, wanted))
        return
    from data_prep.show.inspect import show_rows

    show_rows(arguments.directory, wanted or "0")


def _rejects(arguments: argparse.Namespace) -> None:
    from data_prep.show.rejects import show_rejects, write_rejects_page

    if arguments.html is not None:
        print(write_rejects_page(arguments.directory, arguments.html))
    else:
        show_rejects(arguments.directory)
