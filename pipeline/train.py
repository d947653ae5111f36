"""Entry point of training: ``deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # run as a file: this folder must not shadow the packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.errors import UserError
from pipeline.flags import Invocation, parse
from pipeline.recipe import to_yaml

if TYPE_CHECKING:
    from pipeline.training.blueprint import Blueprint
    from pipeline.training.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Train from a recipe and flags; return the exit code (0 done or stopped, 2 for an error the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parse(words))
    except UserError as error:
        if "--debug" in words:
            raise
        return _report(error)
    except KeyboardInterrupt:
        return 130


def _run(invocation: Invocation) -> int:
    if invocation.print_config:
        print(to_yaml(invocation.config), end="")
        return 0
    from pipeline.training.libraries import settle_libraries

    settle_libraries()
    from pipeline.parallel.groups import device_of_rank, fill_rank_variables, start_processes, stop_processes
    from pipeline.training.blueprint import Blueprint
    from pipeline.training.demo_data import prepare_demo
    from pipeline.training.dry_run import describe
    from pipeline.training.run_folder import RunFolder

    fill_rank_variables()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prepare_demo(invocation.config, rank=rank)
    plan = Blueprint.draw(invocation, rank=rank, world=world)
    if rank == 0:
        print(describe(plan), flush=True)
    if invocation.dry_run:
        return 0
    folder = RunFolder(plan.config.run_dir)
    folder.create()
    try:
        device_of_rank()
        start_processes(plan.config.parallel.timeout_s)
        code = _train(plan, folder)
    except UserError as error:
        if rank:  # met in mid-run, perhaps by this rank alone
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        raise
    stop_processes()  # only when all is well: after a failure, peers may wait in a collective for ever
    return code


def _train(plan: Blueprint, folder: RunFolder) -> int:
    from pipeline.training.trainer import Trainer

    lead = plan.topology.rank == 0
    if lead:
        folder.record_start(plan.config, world=plan.topology.world)
    trainer = None
    try:
        trainer = Trainer(plan, folder)
        state = trainer.fit()
    except BaseException as error:
        folder.set_failed(error, trainer.step if trainer else None)
        raise
    if lead:
        folder.clear_stop()
        folder.set_status(state, trainer.step)
        print(f"{state} at step {trainer.step}/{plan.steps}: {folder.path}", flush=True)
    return 0


def _report(error: UserError) -> int:
    """Print one line, on rank 0: what is refused before the start is refused by every rank alike."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
