"""The state of all ranks as rank 0 knows it: decides when the job has failed and which rank is the cause.

This module opens no socket and reads no clock, so each decision can be tested by itself; see `coordinator`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SETTLE_S = 0.3
"""One rank that dies brings others down. This is how long to collect reports before the first cause is named."""
SILENT_S = 10.0
"""A rank that sends no heartbeat for this long is stopped or unreachable, whatever it reported last."""
TERMINATED = "ended by SIGTERM"
START_S = 300.0
"""Minimum limit before the second step of a start: reading weights and compiling may take longer than any step."""
_SHOWN = 12


def progress_limit(timeout_s: float, steps_begun: int) -> float:
    """Return the seconds without progress after which a job has failed, given the steps begun since its start."""
    return timeout_s if steps_begun > 1 else max(timeout_s, START_S)


@dataclass
class Member:
    """The state of one rank."""

    rank: int
    place: str
    """``stage 0, dp rank 1; host node-2, pid 4242``."""
    state: Literal["running", "died", "failed", "left"] = "running"
    step: int = 0
    begun: int = 0
    """Steps begun since the start."""
    activity: str = "starting"
    where: str = ""
    """Innermost Python frame, once the activity has lasted for a while."""
    waits: bool = False
    """Whether it waits for other ranks."""
    count: int = -1
    """Activities begun so far; a higher count is progress."""
    heard: float = 0.0
    """Time of its last heartbeat."""
    error: str = ""
    code: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"

    @property
    def shown_activity(self) -> str:
        """Its activity, with the code location where known."""
        return f"{self.activity}{f' ({self.where})' if self.where else ''}"


@dataclass(frozen=True)
class Diagnosis:
    """Why the job ends."""

    kind: Literal["died", "error", "hang"]
    text: str
    """One line: who, where, when."""
    others: tuple[str, ...]
    """What each group of the other ranks was doing."""
    step: int
    code: int
    """Exit code of every rank."""


@dataclass
class Monitor:
    """The state of all ranks as rank 0 knows it; times are seconds on rank 0's clock."""

    world: int
    timeout_s: float
    members: dict[int, Member] = field(default_factory=dict)
    _progress: float = 0.0
    _trouble: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether a rank has died or failed, so that more reports may follow."""
        return self._trouble is not None

    def join(self, rank: int, place: str, now: float) -> None:
        """Start to watch a rank."""
        self.members[rank] = Member(rank, place, heard=now)
        self._progress = now

    def record(self, rank: int, heartbeat: dict[str, Any], now: float) -> None:
        """Record a heartbeat."""
        member = self.members[rank]
        member.heard = now
        if (member.step, member.count) != (heartbeat["step"], heartbeat["count"]):
            self._progress = now
        for name in ("step", "begun", "count", "activity", "where", "waits"):
            setattr(member, name, heartbeat[name])

    def failed(self, rank: int, error: str, code: int, now: float) -> None:
        """Record a rank that ends with its own error; ``code`` 2 is a user error."""
        self._end(rank, "failed", now)
        self.members[rank].error, self.members[rank].code = error, code

    def gone(self, rank: int, now: float) -> None:
        """Record that a connection ended; a rank that did not say goodbye has died."""
        if self.members[rank].state == "running":
            self._end(rank, "died", now)

    def left(self, rank: int) -> None:
        """Record that a rank is done."""
        self.members[rank].state = "left"

    def _end(self, rank: int, state: Literal["died", "failed"], now: float) -> None:
        self.members[rank].state = state
        self._trouble = now if self._trouble is None else self._trouble

    def extend_deadline(self, seconds: float) -> None:
        """Do not count time in which this process itself was suspended."""
        self._progress += seconds
        for member in self.members.values():
            member.heard += seconds

    def diagnosis(self, now: float, *, terminated: bool = False) -> Diagnosis | None:
        """Return why the job has failed, or None.

        ``terminated``: this process received SIGTERM, so there is no time to wait for more reports; ranks that only
        received the same signal have not failed.
        """
        if self._trouble is not None and (terminated or now - self._trouble >= SETTLE_S):
            died, failed = self._in_state("died"), self._in_state("failed")
            if terminated:
                failed = [member for member in failed if member.error != TERMINATED]
            if died or failed:
                return self._death(died) if died else self._error(failed)
        running = self._in_state("running")
        if self._trouble is None and running and now - self._progress > self._limit:
            return self._hang(running, now)
        return None

    @property
    def _limit(self) -> float:
        return progress_limit(self.timeout_s, max((member.begun for member in self.members.values()), default=0))

    def _in_state(self, state: str) -> list[Member]:
        return [member for _, member in sorted(self.members.items()) if member.state == state]

    def _death(self, died: Sequence[Member]) -> Diagnosis:
        first = max(died, key=lambda member: (not member.waits, -member.rank))
        more = f", and so did {_ranks(died, first)}" if len(died) > 1 else ""
        last = f"last heartbeat at step {first.step} in {first.shown_activity}"
        text = f"{first} died{more}: killed, or out of host memory; {last}"
        return Diagnosis("died", text, self._others(died), first.step, 1)

    def _error(self, failed: Sequence[Member]) -> Diagnosis:
        """Report a user's error first: other ranks may have failed because that rank had already ended."""
        first = next((member for member in failed if member.code == 2), failed[0])
        alike = {member.rank for member in failed if member.error == first.error}
        who = "" if first.code == 2 and (0 in alike or len(alike) > 1) else f"{first}, step {first.step}: "
        return Diagnosis("error", f"{who}{first.error}", (), first.step, first.code)

    def _hang(self, running: Sequence[Member], now: float) -> Diagnosis:
        silent = [member for member in running if now - member.heard > SILENT_S]
        busy = [member for member in running if not member.waits and member not in silent]
        culprits = silent or (busy if len(busy) < len(running) else [])
        step = max(member.step for member in running)
        begin = f"no rank made progress for {self._limit:g} s (parallel.timeout_s) at step {step}: "
        if silent:
            text = silence(silent[0], now)
        elif culprits:
            text = f"{culprits[0]} hangs in {culprits[0].shown_activity} while the others wait"
        else:
            text = f"all ranks {'wait' if not busy else 'are busy'}; no single rank is the cause"
        more = f"; the same holds for {_ranks(culprits, culprits[0])}" if len(culprits) > 1 else ""
        return Diagnosis("hang", f"{begin}{text}{more}", self._others(culprits), step, 1)

    def _others(self, culprits: Iterable[Member]) -> tuple[str, ...]:
        """Return a line for each group of ranks with the same activity, without the culprits."""
        known = {member.rank for member in culprits}
        groups: dict[str, list[Member]] = {}
        for rank, member in sorted(self.members.items()):
            if rank not in known and member.state in ("running", "failed"):
                state = member.shown_activity if member.state == "running" else f"failed, too: {member.error}"
                groups.setdefault(state, []).append(member)
        lines = [f"{_ranks(group)}: {state}" for state, group in groups.items()]
        missing = [rank for rank in range(self.world) if rank not in self.members]
        lines += [f"{_numbers(missing)}: not watched"] if missing else []
        return (*lines[:_SHOWN], *([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


def silence(member: Member, now: float) -> str:
    """Return how long a rank has been silent, in words."""
    return f"{member} has been silent for {now - member.heard:.0f} s, last in {member.shown_activity}"


def _ranks(members: Iterable[Member], except_for: Member | None = None) -> str:
    return _numbers([member.rank for member in members if member is not except_for])


def _numbers(ranks: Sequence[int]) -> str:
    """Return ``rank 3``, or ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
