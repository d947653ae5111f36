"""Connects the watchdog to a run: starts it on all ranks, and prints and records why a job ended."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from pydantic import ValidationError

from data_prep.common.errors import UserError
from data_prep.common.events import StrictEvent
from data_prep.common.validation import first_problem
from pipeline.checkpoints.checkpoint import SHOWN_S, checkpoint_folders, unfinished_folders
from pipeline.checkpoints.writing import DivergedError
from pipeline.parallel.launch import device_of_rank
from pipeline.parallel.topology import Topology
from pipeline.training.run.folder import DIVERGED, RunFolder, lock_of
from pipeline.training.run.logs import RankLog
from pipeline.training.run.redact import redact
from pipeline.watchdog.channel import listen
from pipeline.watchdog.coordinator import Coordinator
from pipeline.watchdog.monitor import Diagnosis
from pipeline.watchdog.watchdog import Watchdog
from pipeline.watchdog.worker import Worker

SLACK_S = 60


def collective_limit(timeout_s: int) -> int:
    """Return the timeout of collectives in seconds: longer than the watchdog's, whose report names the cause."""
    return timeout_s + SLACK_S


def all_can_start(refused: UserError | None = None) -> bool:
    """Return whether all ranks can start; if not, rank 0 prints why. Collective.

    ``refused`` is this rank's error, such as a file that is missing on its node or a damaged file in its share.
    """
    own = (socket.gethostname(), str(refused) if refused else "")
    gathered: list[tuple[str, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    reasons = {rank: (host, text) for rank, (host, text) in enumerate(gathered) if text}
    if reasons and dist.get_rank() == 0:
        rank, (host, text) = next(iter(reasons.items()))
        print_lines(f"error: {f'rank {rank} on {host}: ' if rank else ''}{redact(text)}")
    if reasons:
        dist.barrier()  # the first rank to exit ends the others: wait until the reason is printed
    return not reasons


def all_ranks_share(folder: RunFolder) -> bool:
    """Return whether all ranks see the run folder that rank 0 has locked; if not, rank 0 prints why. Collective.

    A checkpoint spread over the local disks of several nodes could not be loaded.
    """
    lock = lock_of(folder.path)
    holder = [lock.holder()]
    dist.broadcast_object_list(holder, 0)
    deadline = time.monotonic() + SHOWN_S
    while lock.holder() != holder[0]:
        if time.monotonic() > deadline:
            return all_can_start(
                UserError(
                    f"{folder.path.resolve()} is not rank 0's run folder: give --run-dir a path on a disk shared by "
                    "all nodes"
                )
            )
        time.sleep(0.5)
    return all_can_start()


def watch_ranks(topology: Topology, folder: RunFolder, log: RankLog, timeout_s: int) -> Watchdog:
    """Start the watchdog on all ranks, and draw the number of this start. Collective."""
    watch = Watchdog(
        rank=topology.rank, world=topology.world, place=_place(topology), timeout_s=timeout_s, log=log.stream,
        report=partial(_report, folder), lost=partial(_lost, folder, topology.rank),
    )  # fmt: skip
    listener = _try_to_listen(watch) if topology.rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    numbers = [port, secrets.randbits(62), secrets.randbits(50)]
    shared = torch.tensor(numbers, dtype=torch.long, device=device_of_rank())
    dist.broadcast(shared, 0)
    port, secret, folder.start = shared.tolist()
    if listener is not None:
        watch.start(Coordinator(watch, listener, secret).run)
    elif port:
        watch.start(Worker(watch, (os.environ["MASTER_ADDR"], port), secret).run)
    return watch


def _place(topology: Topology) -> str:
    host, pid = socket.gethostname(), os.getpid()
    return f"stage {topology.stage}, dp rank {topology.dp_rank}; host {host}, pid {pid}"


def _try_to_listen(watch: Watchdog) -> socket.socket | None:
    try:
        return listen()
    except OSError as error:
        watch.warn(f"rank 0 cannot open a port ({error}): there is no watchdog, only the timeout of collectives")
        return None


def _report(folder: RunFolder, diagnosis: Diagnosis) -> None:
    text = redact(diagnosis.text)
    stacks = [f"  stacks of all ranks: {folder.path / 'logs'}"] if diagnosis.kind != "error" else []
    print_lines(
        f"error: {text}",
        *(f"  {line}" for line in diagnosis.others),
        *stacks,
        *folder.event_lines(),
        *_resume_hints(folder),
    )
    folder.set_failed(text, diagnosis.step)
    with suppress(StrictEvent):  # the job ends anyway
        folder.record(
            "run-failed", step=diagnosis.step, kind=diagnosis.kind, error=text,
            others=[redact(line) for line in diagnosis.others],
        )  # fmt: skip


def _resume_hints(folder: RunFolder) -> Iterator[str]:
    """Yield which checkpoint the same command resumes from, and which unfinished save is lost."""
    saved, unfinished = checkpoint_folders(folder.path), unfinished_folders(folder.path)
    if unfinished:
        yield f"  the save of {unfinished[-1].name.split('.')[1]} was interrupted and is lost"
    if saved:
        yield f"  the same command resumes from {saved[0]}"


def _lost(folder: RunFolder, rank: int, text: str, step: int) -> None:
    """Report that rank 0 died or hangs; one rank of each node does so, as none knows which others are left."""
    if rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print_lines(f"error: {text}", *_resume_hints(folder))
        folder.set_failed(text, step)


def end_with(error: BaseException, *, folder: RunFolder, log: RankLog, watch: Watchdog | None, rank: int) -> int:
    """Log this rank's error, have it printed once, and return the exit code."""
    log.error(error)
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, DivergedError):  # on all ranks alike, so rank 0 knows it too when it reports another's error
        folder.reason = DIVERGED
    text = str(error) if code == 2 else f"{_summary(error)}; traceback: {log.path}"
    if watch is None or not watch.fail(text, code):
        report_own_error(text, rank)
        folder.set_failed(text, watch.heartbeat.step if watch else None)
    return code


def report_own_error(error: UserError | str, rank: int) -> None:
    """Print an error that no other rank knows of."""
    print_lines(f"error{f' on rank {rank}' if rank else ''}: {redact(str(error))}")


def _summary(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # its first line only counts the errors
        return f"{type(error).__name__}: {error.title}: {first_problem(error)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def print_lines(*lines: str) -> None:
    """Print lines to stderr in one write, so output of other ranks cannot interleave."""
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
