"""``mma schedule``: the forwards and backwards of one pipeline step, drawn from a simulation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from data_prep.common.command_line import OneLineParser
from pipeline.config.schema import ConfigError, build_config
from pipeline.parallel.schedule import SCHEDULES, Action, bubble
from pipeline.parallel.simulation import Simulation, orders, peak_in_flight, simulate, unit_cost

DESCRIPTION = """\
Draw the timeline of one optimizer step for stages of equal cost, where a backward takes twice as long as a forward.
A number is a micro-batch: forward on a dark background, backward on a light background, followed by dashes. Each
virtual stage has its own colour; a dot is an idle slot. Without a terminal, F, B, and a, b, ... for virtual stages
replace the colours.

  mma schedule --pp 4 --micro-batches 8
  mma schedule --pp 4 --micro-batches 8 --schedule interleaved --virtual-stages 2"""
_DARK = ("blue", "dark_green", "dark_magenta", "dark_orange3")
_LIGHT = ("sky_blue1", "pale_green1", "plum1", "light_goldenrod1")


def schedule_command(argv: Sequence[str]) -> int:
    """Print the timeline and its bubble; return 0. Raises UserError for an invalid combination."""
    parser = OneLineParser(
        "mma schedule", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pp", type=int, default=4, help="pipeline stages (default: 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches per step (default: 8)")
    parser.add_argument("--schedule", default="1f1b", help=f"{', '.join(SCHEDULES)} (default: 1f1b)")
    parser.add_argument(
        "--virtual-stages",
        type=int,
        default=1,
        help="virtual stages per stage, for the interleaved schedule (default: 1)",
    )
    parser.add_argument("--debug", action="store_true", help="print a traceback for errors")
    options = parser.parse_args(list(argv))
    words = {"pp": options.pp, "schedule": options.schedule, "virtual_stages": options.virtual_stages}
    build_config({"parallel": words}, "schedule")  # raises the trainer's own errors
    if options.micro_batches < 1:
        raise ConfigError(f"--micro-batches {options.micro_batches}: give 1 or more")
    console = Console()
    of_stages = orders(options.schedule, options.pp, options.micro_batches, options.virtual_stages)
    step = simulate(of_stages, unit_cost, options.virtual_stages)
    for line in timeline(step, digits=len(str(options.micro_batches - 1))):
        console.print(line, soft_wrap=True)
    peaks = [peak_in_flight(order, [1 / options.virtual_stages] * options.virtual_stages) for order in of_stages]
    ideal = bubble(options.pp, options.micro_batches, options.virtual_stages)
    console.print(
        f"bubble {step.bubble:.1%} of the step (theory {ideal:.1%}); "
        f"at most {', '.join(f'{peak:g}' for peak in peaks)} micro-batches in flight on the stages",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def timeline(step: Simulation, *, digits: int) -> list[Text]:
    """Return one line per stage: ``digits`` columns per unit of time, a dot for each idle column."""
    lines = []
    for stage, slots in enumerate(step.slots):
        line = Text(f"stage {stage:<2} ")
        now = 0.0
        for action, start, end in slots:
            line.append("·" * (digits * round(start - now)), style="dim")
            fill = " " if action.kind == "F" else "-"
            line.append(str(action.microbatch).ljust(digits * round(end - start), fill), style=_style(action))
            now = end
        line.append("·" * (digits * round(step.makespan - now)), style="dim")
        lines.append(line)
    return lines


def _style(action: Action) -> str:
    colours = _DARK if action.kind == "F" else _LIGHT
    ink = "white" if action.kind == "F" else "black"
    return f"{ink} on {colours[action.virtual_stage % len(colours)]}"
