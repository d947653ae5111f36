"""``mma schedule``: the forwards and backwards of one pipeline step, drawn from a simulation."""

from __future__ import annotations

import argparse

from rich.text import Text

from data_prep.common.console import PipeConsole
from pipeline.config.schema import ConfigError, build_config
from pipeline.parallel.schedule import Action, bubble
from pipeline.parallel.simulation import Simulation, orders, peak_in_flight, simulate, unit_cost

MAX_ACTIONS = 100_000
"""Most forwards of a drawn step, over all stages."""
_DARK = ("blue", "dark_green", "dark_magenta", "dark_orange3")
_LIGHT = ("sky_blue1", "pale_green1", "plum1", "light_goldenrod1")


def schedule(options: argparse.Namespace) -> int:
    """Print the timeline and its bubble; return 0. Raises UserError for an invalid combination."""
    pp, count, virtual = options.pp, options.micro_batches, options.virtual_stages
    words = {"pp": pp, "schedule": options.schedule, "virtual_stages": virtual}
    build_config({"parallel": words}, "schedule")  # raises the trainer's own errors
    if pp * count * virtual > MAX_ACTIONS:
        raise ConfigError(
            f"a step of {pp * count * virtual:,} forwards is too long to draw: give at most {MAX_ACTIONS:,}"
        )
    of_stages = orders(options.schedule, pp, count, virtual)
    step = simulate(of_stages, unit_cost, virtual)
    console, digits = PipeConsole(highlight=False), len(str(count - 1))
    for line in timeline(step, digits=digits) if console.color_system else plain_timeline(step, digits, virtual):
        console.print(line, soft_wrap=True)
    peaks = [peak_in_flight(order, [1 / virtual] * virtual) for order in of_stages]
    console.print(
        f"bubble {step.bubble:.1%} of the step (theory {bubble(pp, count, virtual):.1%}); "
        f"at most {', '.join(f'{peak:g}' for peak in peaks)} micro-batches in flight on the stages",
        soft_wrap=True,
    )
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


def plain_timeline(step: Simulation, digits: int, virtual_stages: int) -> list[Text]:
    """Return the timeline without colours: a bar starts each action, such as ``|F3`` or ``|B3.1--``.

    ``.1`` is the virtual stage; columns are wide enough for a bar, a letter, the micro-batch and the virtual stage.
    """
    width = 2 + digits + (1 + len(str(virtual_stages - 1)) if virtual_stages > 1 else 0)
    lines = []
    for stage, slots in enumerate(step.slots):
        words, now = [f"stage {stage:<2} "], 0.0
        for action, start, end in slots:
            words.append("." * (width * round(start - now)))
            suffix = f".{action.virtual_stage}" if virtual_stages > 1 else ""
            fill = " " if action.kind == "F" else "-"
            words.append(f"|{action.kind}{action.microbatch}{suffix}".ljust(width * round(end - start), fill))
            now = end
        words.append("." * (width * round(step.makespan - now)))
        lines.append(Text("".join(words)))
    return lines


def _style(action: Action) -> str:
    colours = _DARK if action.kind == "F" else _LIGHT
    ink = "white" if action.kind == "F" else "black"
    return f"{ink} on {colours[action.virtual_stage % len(colours)]}"
