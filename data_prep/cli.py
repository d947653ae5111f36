"""``mma-prep``: raw corpora -> packs.

Heavy libraries are imported inside the commands, so help is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import (
    OneLineParser,
    add_version,
    folder_path,
    output_file,
    print_completion,
    run_command,
)
from data_prep.common.errors import UserError
from data_prep.common.events import parse_strict
from data_prep.init.flags import add_commands, write_recipe
from data_prep.show.command import add_inspect_arguments, inspect_packs

if TYPE_CHECKING:
    from data_prep.common.workers import Team
    from data_prep.progress import Reporter
    from data_prep.recipe import Recipe

_OVERVIEW = """\
Turn raw image-text corpora into packed rows for training.

  raw shards --ingest--> tokens + images --plan--> order of rows --materialize--> packs

Every step continues where it stopped and does only what has changed. The packs are
byte-identical for any number of workers.
"""
_EXAMPLES = """\
examples:
  mma-prep init my_data/                      look at your own data and write a recipe for it
  mma-prep demo data/demo                     draw a small world and pack it (under a minute)
  mma-prep run nlvr --out data/nlvr           all steps of a shipped recipe
  mma-prep run my_recipe.yaml --workers 16    all steps of your own recipe
  mma-prep inspect data/demo/packs/sft --row 3
  mma-prep inspect data/demo/packs/sft --html rows.html
  mma-prep rejects data/demo                  which samples were rejected, and why
  mma-prep plan my_recipe.yaml --suggest-seq-len
  mma-prep verify data/demo                   check the hash of every file

on a cluster:
  mpiexec -n 64 python -m mpi4py -m data_prep ingest RECIPE
  mma-prep ingest RECIPE --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
  mma-prep plan RECIPE && mma-prep materialize RECIPE

exit codes: 0 done, 2 an error you can fix (one line on stderr; also an event made fatal by
--strict), 130 stopped by Ctrl-C, 1 a bug. Run the same command again to continue.
"""
_RUN = """\
Run all steps of a recipe: ingest, plan, materialize.

The output folder (`out` in the recipe, or --out) then holds
  packs/SET/         packed rows of every pack set: give this folder to the trainer
  images/KEY/        the image store that the packs refer to
  tokenizer/         the tokenizer of the packs
  rejects.jsonl      rejected samples with their reasons (mma-prep rejects OUT)
  events.jsonl       what was dropped, repaired, rebuilt or skipped
  ingest/            tokenised samples, so the next change of the recipe is cheap
"""
_INGEST = """\
Step 1: tokenise samples and collect images.

Only new and changed raw files are read. A raw file is identified by its name, size and
modification time; copy raw data with its times (cp -a, rsync -a).
"""
_PLAN = """\
Step 2: draw, order and pack samples; writes an index only.

The index (packs/SET/plan.arrow) assigns every draw of a sample to a row. The order of rows is
the order of training.
"""
_MATERIALIZE = """\
Step 3: write the packed rows in the order of the plan.
"""
_VERIFY = """\
Check the hash of every file.

Covers packs, image store, tokenizer, ingest and rejects. Prints one line for each intact
part; the first damaged or missing file is an error that names it and how to rebuild it.
Not checked: .work folders and events.jsonl.
"""
_STATS = """\
Print corpora, sample lengths and packing efficiency.
"""
_DEMO = """\
Draw a small world of shapes and pack it.

Writes captions for pre-training (packs/pt), questions for instruction tuning (packs/sft) and
held-out questions (packs/eval), through the same steps as real data.
"""
_INSPECT = """\
Show packed rows, decoded.

Shows given and generated text, images, and the source of every sample. Prints to the
terminal, or writes one HTML page with --html. `mma inspect` is the same command with
the attention mask of every row on the page.
"""
_REJECTS = """\
Show which samples were rejected, and why.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (see ``_EXAMPLES``)."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        arguments = build_parser().parse_args(words)
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
        return 0

    return run_command(
        "mma-prep", work, debug="--debug" in words, stopped="stopped; run the same command again to continue"
    )


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
    work.add_argument(
        "--strict", metavar="CODES", help="make events fatal: all, or codes as in events.jsonl (sample-rejected,...)"
    )
    recipe = OneLineParser(add_help=False, parents=[work])
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    recipe.add_argument("--out", metavar="DIR", help="output folder (default: out of the recipe)")
    recipe.add_argument("--root", metavar="DIR", help="raw data folder (default: root of the recipe)")
    share = OneLineParser(add_help=False, parents=[recipe])
    share.add_argument("--shard", metavar="I/N", help="do share I of N, 0 <= I < N (a task of a Slurm array)")
    folder = OneLineParser(add_help=False, parents=[debug])
    folder.add_argument(
        "directory", type=folder_path, metavar="DIR", help="a pack folder, or an output folder with several"
    )
    for name, parent, command, text in (
        ("demo", work, _demo, _DEMO),
        ("run", recipe, _run, _RUN),
        ("ingest", share, _ingest, _INGEST),
        ("plan", recipe, _plan, _PLAN),
        ("materialize", share, _materialize, _MATERIALIZE),
        ("verify", folder, _verify, _VERIFY),
        ("stats", folder, _stats, _STATS),
        ("inspect", debug, inspect_packs, _INSPECT),
        ("rejects", debug, _rejects, _REJECTS),
    ):
        summary = text.partition("\n")[0].rstrip(".,:")
        added = commands.add_parser(name, parents=[parent], help=summary, description=text, formatter_class=raw)
        added.set_defaults(command=command)
    demo, plan, rejects = (commands.choices[name] for name in ("demo", "plan", "rejects"))
    demo.add_argument("out", type=folder_path, metavar="OUT", help="output folder")
    demo.add_argument("--scenes", type=int, default=20_000, metavar="N", help="scenes to draw (default: %(default)s)")
    demo.add_argument("--held-out", type=int, default=600, metavar="N", help="held-out scenes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the world (default: %(default)s)")
    plan.add_argument(
        "--suggest-seq-len", action="store_true", help="print the packing efficiency of other row lengths; plan nothing"
    )
    add_inspect_arguments(commands.choices["inspect"])
    rejects.add_argument("directory", type=folder_path, metavar="DIR", help="an output folder")
    rejects.add_argument("--html", type=output_file, metavar="FILE", help="write an HTML page with images instead")
    completion = commands.add_parser("completion", parents=[debug], help="print a shell completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete in")
    completion.set_defaults(command=lambda options: print_completion(build_parser(), options.shell))
    add_commands(commands, debug)
    commands.choices["init"].set_defaults(command=_init)
    return parser


def _init(arguments: argparse.Namespace) -> None:
    recipe = write_recipe(arguments)
    if arguments.run:
        sys.exit(main(["run", str(recipe)]))


def _load(arguments: argparse.Namespace) -> Recipe:
    from data_prep.recipe import load_recipe

    overrides = {key: getattr(arguments, key) for key in ("out", "root") if getattr(arguments, key) is not None}
    recipe = load_recipe(arguments.recipe, overrides, check_files=arguments.recipe != "demo")
    if arguments.recipe == "demo" and not recipe.root_dir.is_dir():
        raise UserError(f"the demo does not exist yet: run `mma-prep demo {recipe.out_dir}`, which draws and packs it")
    return recipe


def _with_team(arguments: argparse.Namespace, work: Callable[[Team, Reporter], object]) -> None:
    """Run work with the processes the user asked for; only one process of a team reports."""
    from data_prep.common.workers import form_team
    from data_prep.progress import Reporter

    strict = parse_strict(arguments.strict)
    team = form_team(arguments.workers, getattr(arguments, "shard", None), Reporter().say)
    if team is None:
        return
    reporter = Reporter(quiet=not team.is_reporter, strict=strict)
    try:
        work(team, reporter)
    finally:
        reporter.say_events()


def _with_recipe(arguments: argparse.Namespace, work: Callable[[Recipe, Team, Reporter], object]) -> None:
    """Run work on a recipe while no other process writes to its output folder, except shares of the same step."""
    from data_prep.common.workers import LocalTeam
    from data_prep.ingest.workspace import lock_of

    recipe = _load(arguments)

    def alone(team: Team, reporter: Reporter) -> None:
        with ExitStack() as held:
            events = reporter.events(recipe.out_dir)

            def take() -> None:  # returns nothing: a result would be sent to the other ranks
                lock = lock_of(recipe.out_dir)
                unlocked: list[str] = []
                held.enter_context(
                    lock.hold(reporter.say, shared=not team.covers_all, unlocked=lambda: unlocked.append(""))
                )
                events.record("lock-unavailable", len(unlocked), path=lock.path)
                events.record("mpi-unavailable", int(isinstance(team, LocalTeam) and team.without_mpi))

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


def _rejects(arguments: argparse.Namespace) -> None:
    from data_prep.show.rejects import show_rejects, write_rejects_page

    html: Path | None = arguments.html
    if html is not None:
        print(write_rejects_page(arguments.directory, html))
    else:
        show_rejects(arguments.directory)
