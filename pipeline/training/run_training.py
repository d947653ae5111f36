"""One run from its configuration to its exit code: plan, folder, process group, watchdog, trainer."""

from __future__ import annotations

import os
import traceback

from data_prep.common.errors import UserError
from pipeline.config.flags import Invocation
from pipeline.parallel.launch import (
    bind_cores,
    device_of_rank,
    fill_rank_variables,
    set_determinism,
    start_processes,
    stop_processes,
)
from pipeline.planning.capacity import check_memory
from pipeline.planning.dry_run import describe, describe_loader
from pipeline.planning.run_plan import RunPlan, read_parallel_settings
from pipeline.training.demo_data import prepare_demo
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.logs import RankLog
from pipeline.training.run.redact import refuse_secrets
from pipeline.training.start_events import record_start_events
from pipeline.training.supervise import (
    all_can_start,
    all_ranks_share,
    collective_limit,
    end_with,
    report_own_error,
    watch_ranks,
)
from pipeline.training.trainer import Trainer
from pipeline.watchdog.watchdog import Watchdog


def run_training(invocation: Invocation, *, debug: bool = False) -> int:
    """Train, or print the plan of a dry run; return the exit code: 0 done or stopped, 2 user error, 1 other error.

    Raises:
        UserError: The run cannot start, and no other rank waits for this one.
    """
    refuse_secrets(invocation.config.model_dump())
    fill_rank_variables()
    world = invocation.ranks or int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"]) % world  # a dry run may describe fewer ranks than were launched
    try:
        plan, folder, oversubscribed = _prepare(invocation, rank, world)
    except UserError as error:
        if world == 1 or invocation.dry_run:
            raise
        return _refuse(invocation, error)
    if invocation.dry_run:
        return 0
    code = _supervise(plan, folder, oversubscribed, debug=debug)
    if code == 0:
        stop_processes()  # only after success: after a failure, peers may be stuck in a collective
    return code


def _prepare(invocation: Invocation, rank: int, world: int) -> tuple[RunPlan, RunFolder, list[str]]:
    """Check and print the run; claim its folder unless this is a dry run. Raises UserError, possibly on one rank."""
    read_parallel_settings(invocation, rank=rank, world=world)  # report a wrong flag before the demo data is built
    prepare_demo(invocation.config, rank=rank, dry_run=invocation.dry_run)
    plan = RunPlan.build(invocation, rank=rank, world=world)
    if rank == 0:
        print(describe(plan), *([describe_loader(plan)] if invocation.dry_run else []), sep="\n", flush=True)
    folder, oversubscribed = RunFolder(plan.config.run_dir, invocation.strict), list[str]()
    if not invocation.dry_run:
        oversubscribed = check_memory(plan)
        folder.create()
        if rank == 0:
            folder.claim()
    return plan, folder, oversubscribed


def _refuse(invocation: Invocation, error: UserError) -> int:
    """Refuse to start, after telling every rank why; return the exit code."""
    try:
        device_of_rank()
        start_processes(collective_limit(invocation.config.parallel.timeout_s))
        all_can_start(error)
    except (UserError, RuntimeError):  # the other ranks cannot be reached
        report_own_error(error, int(os.environ["RANK"]))
    return 2


def _supervise(plan: RunPlan, folder: RunFolder, oversubscribed: list[str], *, debug: bool) -> int:
    """Train under the watchdog; return the exit code, after reporting an error of this rank to all others."""
    topology, timeout_s = plan.topology, plan.config.parallel.timeout_s
    log, watch = RankLog(folder, topology.rank), None
    try:
        device = device_of_rank()
        set_determinism(plan.config.train.deterministic)
        start_processes(collective_limit(timeout_s))
        if device.type == "cuda":
            bind_cores()
        if not (all_can_start() and all_ranks_share(folder)):
            return 2
        watch = watch_ranks(topology, folder, log, timeout_s)
        _train(plan, folder, watch, oversubscribed)
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


def _train(plan: RunPlan, folder: RunFolder, watch: Watchdog, oversubscribed: list[str]) -> None:
    is_rank0 = plan.topology.rank == 0
    if is_rank0:
        folder.record_start(plan.config, world=plan.topology.world, steps=plan.steps)
        record_start_events(plan, folder, watched=watch.alive, oversubscribed=oversubscribed)
    trainer = Trainer(plan, folder, watch.heartbeat)
    state = trainer.fit()
    if is_rank0:
        folder.clear_stop()
        folder.set_status(state, trainer.step)
        print(f"{state} at {trainer.place}: {folder.path}", *folder.event_lines(), sep="\n", flush=True)
