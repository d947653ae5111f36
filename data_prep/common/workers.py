"""Parallel work: local processes, one share of a Slurm array, or MPI ranks.

Tasks are independent and their outputs are files, so the assignment of tasks to processes never changes a byte.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data_prep.common.errors import UserError
from data_prep.common.processes import worker_pool

T = TypeVar("T")
R = TypeVar("R")
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
"""Rank variables set by mpiexec: MPICH and Intel MPI, PMIx, Open MPI."""


class Team(ABC):
    """Runs a task over a list of items."""

    description: str

    @abstractmethod
    def map(self, task: Callable[[T], R], items: Sequence[T], done: Callable[[R], None]) -> None:
        """Run ``task`` on the items; call ``done`` with each result as it arrives, in any order."""

    @abstractmethod
    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items assigned to this process.

        Always divide the complete list: members may disagree about which items are unfinished.
        """

    def serial(self, task: Callable[[], R]) -> R:
        """Run a task on one member only; every member returns its result."""
        return task()

    @property
    def is_reporter(self) -> bool:
        """Whether this process reports to the user."""
        return True

    @property
    def covers_all(self) -> bool:
        """Whether the team does all of the work, rather than one share of several jobs."""
        return True


class LocalTeam(Team):
    """``workers`` processes on this machine, for share ``index`` of ``count`` (a Slurm array task)."""

    def __init__(self, workers: int, index: int = 0, count: int = 1, *, without_mpi: bool = False) -> None:
        self.workers, self.index, self.count = workers, index, count
        self.without_mpi = without_mpi
        """Whether it stands in for MPI ranks, because MPI cannot be loaded."""
        part = f", share {index} of {count}" if count > 1 else ""
        self.description = f"{workers} process{'es' * (workers > 1)}{part}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items assigned to this process."""
        return items[self.index :: self.count]

    @property
    def covers_all(self) -> bool:
        """False for one of several shares."""
        return self.count == 1

    def map(self, task: Callable[[T], R], items: Sequence[T], done: Callable[[R], None]) -> None:
        """Spread the items over the processes."""
        results = map(task, items) if min(self.workers, len(items)) <= 1 else self._spread(task, items)
        for result in results:
            done(result)

    def _spread(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        with worker_pool(min(self.workers, len(items))) as pool:
            futures = [pool.submit(task, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed (out of memory?): run the same command again, finished shards are "
                    "kept; use fewer --workers if it happens again"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


ALONE = LocalTeam(1)
"""A single process without workers."""


class MpiTeam(Team):
    """The ranks of an MPI launch; item ``k`` is assigned to rank ``k % size``."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.description = f"{comm.Get_size()} MPI ranks"

    @property
    def is_reporter(self) -> bool:
        """Only rank 0 reports."""
        return bool(self._comm.Get_rank() == 0)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items assigned to this process."""
        return items[self._comm.Get_rank() :: self._comm.Get_size()]

    def map(self, task: Callable[[T], R], items: Sequence[T], done: Callable[[R], None]) -> None:
        """Run this rank's items, then wait for the other ranks; a user error is raised on every rank."""

        def work() -> None:
            for item in items:
                done(task(item))

        _, problem = self._attempt(work)
        problems = [message for message in self._comm.allgather(problem) if message]
        if problems:
            raise UserError(problems[0])

    def serial(self, task: Callable[[], R]) -> R:
        """Run the task on rank 0; a user error is raised on every rank."""
        result, problem = self._comm.bcast(self._attempt(task) if self.is_reporter else None, root=0)
        if problem:
            raise UserError(problem)
        returned: R = result
        return returned

    def _attempt(self, task: Callable[[], R]) -> tuple[R | None, str]:
        """Return the task's result, or the message of a UserError or OSError.

        Any other failure aborts all ranks, because the others would wait forever.
        """
        try:
            return task(), ""
        except (UserError, OSError) as error:
            return None, str(error)
        except BaseException:
            traceback.print_exc()
            self._comm.Abort(1)
            raise


def parse_share(text: str) -> tuple[int, int]:
    """Parse ``i/n`` (0-based). Raises UserError if malformed."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and len(text) < 32 and int(index) < int(count):
        return int(index), int(count)
    raise UserError(
        f"--shard {text}: give i/n with 0 <= i < n, e.g. --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    )


def form_team(workers: int | None, share: str | None, say: Callable[[str], None]) -> Team | None:
    """Return the team: MPI ranks under mpiexec, else local processes (default: one per core).

    Returns None for a process without work: rank > 0 of an mpiexec launch without an MPI library.

    Raises:
        UserError: ``workers`` or ``share`` is malformed, or ``share`` is combined with MPI.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    without_mpi = False
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), None)
    if rank is not None:
        comm = _world(say if rank == "0" else lambda line: None)
        if comm is None and rank != "0":
            return None
        without_mpi = comm is None
        if comm is not None and comm.Get_size() > 1:
            if share is not None:
                raise UserError("--shard divides work between separate jobs; under mpiexec leave it out")
            return MpiTeam(comm)
    index, count = parse_share(share) if share is not None else (0, 1)
    return LocalTeam(workers or _cores(), index, count, without_mpi=without_mpi)


def _world(say: Callable[[str], None]) -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed, an MPI library is not
        reason = str(error).splitlines()[0]
        say(f"launched by mpiexec, but MPI cannot be loaded ({reason}): using local processes on rank 0")
        return None
    return MPI.COMM_WORLD


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
