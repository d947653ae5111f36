"""Ties the watchdog to a run: starts it on all ranks, and says and records in the run folder why a job ended."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from pydantic import ValidationError

from data_prep.common.errors import UserError
from data_prep.common.validation import first_problem
from pipeline.checkpoints.checkpoint import SHOWN_S, checkpoint_folders, unfinished_folders
from pipeline.parallel.launch import device_of_rank
from pipeline.parallel.topology import Topology
from pipeline.training.run.folder import RunFolder, lock_of
from pipeline.training.run.logs import RankLog
from pipeline.training.run.redact import redact
from pipeline.watchdog.channel import listen
from pipeline.watchdog.coordinator import Coordinator
from pipeline.watchdog.monitor import Diagnosis
from pipeline.watchdog.watchdog import Watchdog
from pipeline.watchdog.worker import Worker

SLACK_S = 60


def collective_limit(timeout_s: int) -> int:
    """Return the limit of collectives in seconds: later than the watchdog's, which knows whom they wait for."""
    return timeout_s + SLACK_S


def all_can_start(refused: UserError | None = None) -> bool:
    """Return whether no rank of a process group that has been joined refuses to start; rank 0 says why. Collective.

    ``refused`` is why this rank does: a file that only its node lacks, or its share of what all ranks look through.
    """
    own = (socket.gethostname(), str(refused) if refused else "")
    gathered: list[tuple[str, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    reasons = {rank: (host, text) for rank, (host, text) in enumerate(gathered) if text}
    if reasons and dist.get_rank() == 0:
        rank, (host, text) = next(iter(reasons.items()))
        say(f"error: {f'rank {rank} on {host}: ' if rank else ''}{redact(text)}")
    if reasons:
        dist.barrier()  # the first rank to go takes the others with it: not before it is said
    return not reasons


def all_share(folder: RunFolder) -> bool:
    """Return whether all ranks see the folder that rank 0 has taken; rank 0 says who does not. Collective.

    A checkpoint in folders of several nodes, or of several working directories, would be none.
    """
    lock = lock_of(folder.path)
    taken = [lock.holder()]
    dist.broadcast_object_list(taken, 0)
    patience = time.monotonic() + SHOWN_S
    while lock.holder() != taken[0]:
        if time.monotonic() > patience:
            return all_can_start(
                UserError(
                    f"{folder.path.resolve()} is not rank 0's run folder: give --run-dir a path on a disk that all "
                    "nodes share"
                )
            )
        time.sleep(0.5)
    return all_can_start()


def watch_ranks(topology: Topology, folder: RunFolder, log: RankLog, timeout_s: int) -> Watchdog:
    """Start the watchdog on all ranks of a process group that has been joined, and name the start. Collective."""
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
    return f"stage {topology.stage}, replica {topology.dp_rank}; host {host}, pid {pid}"


def _try_to_listen(watch: Watchdog) -> socket.socket | None:
    try:
        return listen()
    except OSError as error:
        watch.warn(f"rank 0 cannot open a port ({error}): there is no watchdog, only the limit of collectives")
        return None


def _report(folder: RunFolder, diagnosis: Diagnosis) -> None:
    text = redact(diagnosis.text)
    stacks = [f"  stacks of all ranks: {folder.path / 'logs'}"] if diagnosis.kind != "error" else []
    say(f"error: {text}", *(f"  {line}" for line in diagnosis.others), *stacks, *_what_remains(folder))
    folder.set_failed(text, diagnosis.step)
    folder.add_incident(
        step=diagnosis.step, kind=diagnosis.kind, error=text, others=[redact(line) for line in diagnosis.others]
    )


def _what_remains(folder: RunFolder) -> Iterator[str]:
    """Yield what the same command would go on from, and what of a save is lost."""
    saved, torn = checkpoint_folders(folder.path), unfinished_folders(folder.path)
    if torn:
        yield f"  the save of {torn[-1].name.split('.')[1]} was cut short and is lost"
    if saved:
        yield f"  the same command goes on from {saved[0]}"


def _lost(folder: RunFolder, rank: int, text: str, step: int) -> None:
    """One rank of each node says it: who is left when rank 0 is not, nobody knows."""
    if rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"error: {text}", *_what_remains(folder))
        folder.set_failed(text, step)


def end_with(error: BaseException, *, folder: RunFolder, log: RankLog, watch: Watchdog | None, rank: int) -> int:
    """Log what went wrong on this rank, see to it that it is said once, and return the exit code."""
    log.error(error)
    code = 2 if isinstance(error, UserError) else 1
    text = str(error) if code == 2 else f"{_in_short(error)}; traceback: {log.path}"
    if watch is None or not watch.fail(text, code):
        say_own(text, rank)
        folder.set_failed(text, watch.heartbeat.step if watch else None)
    return code


def say_own(error: UserError | str, rank: int) -> None:
    """Say an error that no other rank knows of."""
    say(f"error{f' on rank {rank}' if rank else ''}: {redact(str(error))}")


def _in_short(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # its first line says only that there are some
        return f"{type(error).__name__}: {error.title}: {first_problem(error)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def say(*lines: str) -> None:
    """Print lines to stderr in one piece, so that other ranks cannot come between."""
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
