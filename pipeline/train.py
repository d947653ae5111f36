"""Entry point of training: ``deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":  # run as a file: this folder must not shadow the packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.errors import UserError
from pipeline.flags import Invocation, parse
from pipeline.recipe import to_yaml

if TYPE_CHECKING:
    from pipeline.training.blueprint import Blueprint
    from pipeline.training.run.folder import RunFolder
    from pipeline.training.watchdog.watch import Watch


def main(argv: Sequence[str] | None = None) -> int:
    """Train from a recipe and flags; return the exit code: 0 done or stopped, 2 what the user can mend, 1 others."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parse(words), debug="--debug" in words)
    except UserError as error:
        if "--debug" in words:
            raise
        return _report(error)
    except KeyboardInterrupt:
        return 130


def _run(invocation: Invocation, *, debug: bool) -> int:
    if invocation.print_config:
        print(to_yaml(invocation.config), end="")
        return 0
    _load_libraries()
    from pipeline.parallel.groups import fill_rank_variables, stop_processes
    from pipeline.training.run.redact import refuse_secrets

    refuse_secrets(invocation.config.model_dump())
    fill_rank_variables()
    world = invocation.ranks or int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"]) % world  # a dry run may be of fewer than have been started
    try:
        plan, folder = _prepare(invocation, rank, world)
    except UserError as error:
        if world == 1 or invocation.dry_run:
            raise
        return _refuse(invocation, error)
    if invocation.dry_run:
        return 0
    code = _supervise(plan, folder, debug=debug)
    if code == 0:
        stop_processes()  # only when all is well: after a failure, peers may wait in a collective for ever
    return code


def _load_libraries() -> None:
    """Import what training needs, seconds of a start: there is no garbage to look for meanwhile, nor in it later."""
    gc.disable()
    try:
        from pipeline.training.libraries import settle_libraries

        settle_libraries()
        import pipeline.training.blueprint
        import pipeline.training.supervise
        import pipeline.training.trainer  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _prepare(invocation: Invocation, rank: int, world: int) -> tuple[Blueprint, RunFolder]:
    """Check and print the run; take its folder unless this is a dry run. Raises UserError, maybe on this rank alone."""
    from pipeline.training.blueprint import Blueprint, read_setting
    from pipeline.training.demo_data import prepare_demo
    from pipeline.training.dry_run import describe
    from pipeline.training.run.folder import RunFolder

    read_setting(invocation, rank=rank, world=world)  # a wrong flag is told before the demo's data is made
    prepare_demo(invocation.config, rank=rank, dry_run=invocation.dry_run)
    plan = Blueprint.draw(invocation, rank=rank, world=world)
    if rank == 0:
        print(describe(plan), flush=True)
    folder = RunFolder(plan.config.run_dir)
    if not invocation.dry_run:
        folder.create()
        if rank == 0:
            folder.claim()
    return plan, folder


def _refuse(invocation: Invocation, error: UserError) -> int:
    """End a start that this rank cannot take part in, once all ranks know; return the exit code."""
    from pipeline.parallel.groups import device_of_rank, start_processes
    from pipeline.training.supervise import all_can_start, collective_limit, say_own

    try:
        device_of_rank()
        start_processes(collective_limit(invocation.config.parallel.timeout_s))
        all_can_start(error)
    except (UserError, RuntimeError):  # it meets no others
        say_own(error, int(os.environ["RANK"]))
    return 2


def _supervise(plan: Blueprint, folder: RunFolder, *, debug: bool) -> int:
    """Train under the watchdog; return the exit code, once all ranks know of an error of this one."""
    from pipeline.parallel.groups import device_of_rank, start_processes
    from pipeline.training.run.logs import RankLog
    from pipeline.training.supervise import all_can_start, all_share, collective_limit, end_with, watch_ranks

    topology, timeout_s = plan.topology, plan.config.parallel.timeout_s
    log, watch = RankLog(folder, topology.rank), None
    try:
        device_of_rank()
        start_processes(collective_limit(timeout_s))
        if not (all_can_start() and all_share(folder)):
            return 2
        watch = watch_ranks(topology, folder, log, timeout_s)
        _train(plan, folder, watch)
        watch.close()
        return 0
    except KeyboardInterrupt:
        if watch is not None:
            watch.close()
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        return end_with(error, folder=folder, log=log, watch=watch, rank=topology.rank)


def _train(plan: Blueprint, folder: RunFolder, watch: Watch) -> None:
    from pipeline.training.trainer import Trainer

    lead = plan.topology.rank == 0
    if lead:
        folder.record_start(plan.config, world=plan.topology.world, steps=plan.steps)
    trainer = Trainer(plan, folder, watch.activity)
    state = trainer.fit()
    if lead:
        folder.clear_stop()
        folder.set_status(state, trainer.step)
        print(f"{state} at {trainer.place}: {folder.path}", flush=True)


def leave(code: int) -> NoReturn:
    """End the process; after a failure at once, for the end of the interpreter waits for what may never come.

    A writer of checkpoints may sit in a file system that is gone, a collective wait for ranks that are.
    """
    if code == 0:
        sys.exit()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _report(error: UserError) -> int:
    """Print one line, on rank 0: what is wrong with a command is so on every rank alike."""
    from pipeline.training.run.redact import redact

    if os.environ.get("RANK", "0") == "0":
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    leave(main())
