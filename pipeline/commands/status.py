"""``mma status``: one line per run."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.common.errors import UserError, one_line
from data_prep.common.events import describe_events
from pipeline.training.run.state import RunState, format_duration


def status(options: argparse.Namespace) -> int:
    """Print one line per run folder; return 0. Raises UserError if there is none."""
    runs = options.runs or sorted(path.parent for path in Path("runs").glob("*/status.json"))
    if not runs:
        raise UserError("no runs in runs/: name run folders")
    width = max(len(str(run)) for run in runs)
    for run in runs:
        try:
            line = status_line(RunState.read(run))
        except UserError as error:
            if options.runs:
                raise
            line = f"unreadable  {error}"  # the other runs matter, too
        print(f"{run!s:{width}}  {line}", flush=True)
    return 0


def status_line(run: RunState) -> str:
    """Return the state of a run as one line."""
    parts = [f"{run.state:8}", f"step {run.step:,}" + (f"/{run.steps:,}" if run.steps else "")]
    if run.last.get("loss") is not None:
        parts.append(f"loss {run.last['loss']:.4f}")
    if run.last.get("tokens_per_s") is not None and run.state.startswith("running"):
        parts.append(f"{run.last['tokens_per_s']:,.0f} tok/s")
    parts += [run.checkpoint.name if run.checkpoint else "no checkpoint", f"{format_duration(run.age_s)} ago"]
    events = describe_events(run.events)
    line = "  ".join([*parts, *filter(None, (events, one_line(run.error)))])
    return "".join(letter if letter.isprintable() else "?" for letter in line)
