"""``mma study``: run, watch and report a study."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, did_you_mean
from pipeline.study.folder import StudyFolder
from pipeline.study.graph import Run
from pipeline.study.spec import load_study
from pipeline.training.run.state import RunState, format_duration

SCRIPT = "slurm/study.sh"


def study(options: argparse.Namespace) -> int:
    """Run, show or report a study; return 0. Raises UserError if a run fails or the study is wrong."""
    given = {"--arms": options.arms, "--slurm": options.slurm, "--dry-run": options.dry_run}
    if options.action != "run" and (unused := [flag for flag, value in given.items() if value]):
        raise UserError(f"{unused[0]} goes with mma study run alone: {options.action} is of the whole study")
    folder = StudyFolder(load_study(options.study))
    if options.action == "status":
        print(*status(folder), sep="\n")
    elif options.action == "report":
        from pipeline.study.page import write_report

        print(*write_report(folder), sep="\n")
    else:
        _run(folder, options)
    return 0


def _run(folder: StudyFolder, options: argparse.Namespace) -> None:
    from pipeline.study.runner import StudyRunner

    arms = [name for name in options.arms.split(",") if name]
    for name in arms:
        if name not in folder.study.arms:
            raise UserError(f"--arms {name}: no such arm{did_you_mean(name, folder.study.arms)}")
    if options.slurm:
        submit(options.study, options.slurm, options.arms, dry_run=options.dry_run)
        return
    if options.dry_run:
        print(*(run.name for run in folder.runs(arms) if not folder.is_done(run)), sep="\n")
        return
    runner = StudyRunner(folder, options.study, partial(print, flush=True), only=arms)
    runner.prepare()
    runner.run(options.workers)
    print(f"all runs are finished: mma study report {options.study}")


def status(folder: StudyFolder) -> list[str]:
    """Return a line for each arm, one for the stages they share, and one with the time that is left."""
    runs = folder.runs()
    states = {run.name: _state(folder, run) for run in runs}
    lines = []
    for arm in ("", *folder.study.arms):
        own = [run for run in runs if run.arm == arm]
        counts = Counter(states[run.name] for run in own)
        shown = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        rest = "" if arm in folder.chosen() or not arm else "; its rate is not chosen yet"
        lines.append(f"{arm or '(shared stages)':28} {shown or 'no runs'}{rest}")
    done = sum(state == "done" for state in states.values())
    return [*lines, f"{done} of {folder.total} runs done{_time_left(folder, runs, states)}"]


def _state(folder: StudyFolder, run: Run) -> str:
    if folder.is_done(run):
        return "done"
    if folder.lock(run).is_held():
        return "running"
    try:
        return {"done": "to be asked"}.get(state := RunState.read(folder.run_dir(run)).state, state)
    except UserError:
        return "missing"


def _time_left(folder: StudyFolder, runs: Sequence[Run], states: dict[str, str]) -> str:
    """Return an estimate from the time the finished runs took, one after another."""
    took = [seconds for run in runs if states[run.name] == "done" and (seconds := _seconds(folder.metrics(run)))]
    left = folder.total - sum(state == "done" for state in states.values())
    if not took or not left:
        return ""
    at_once = max(1, sum(state == "running" for state in states.values()))
    each = sum(took) / len(took)
    return (
        f", about {format_duration(each * left / at_once)} left at {at_once} at a time ({format_duration(each)} a run)"
    )


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that a run's steps, evaluations and saves took, over all of its starts."""
    return sum(float(line.get(part) or 0) for line in lines for part in ("step_s", "eval_s", "save_s"))


def submit(name: str, tasks: int, arms: str, *, dry_run: bool) -> None:
    """Submit an array of tasks that share the runs. Raises UserError without the script or sbatch."""
    command = ["sbatch", f"--array=0-{tasks - 1}", SCRIPT, name, *(["--arms", arms] if arms else [])]
    if not Path(SCRIPT).is_file():
        raise UserError(f"{SCRIPT} is not in this folder: run mma slurm init first")
    print("$", *command, flush=True)
    if dry_run:
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: run this where jobs are submitted, or without --slurm")
    code = subprocess.run(command, env={**os.environ}, check=False).returncode
    if code:
        raise UserError(f"sbatch failed with exit code {code}")
