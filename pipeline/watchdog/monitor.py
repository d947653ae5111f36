"""What rank 0 knows of all ranks: decides when the job has failed, through whom, and says it in words.

No socket is opened here and no clock is read, so that every decision can be tested by itself; see `watch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SETTLE_S = 0.3
"""A rank that dies takes others with it: so long is waited for all the news before the first cause is named."""
SILENT_S = 10.0
"""A rank that says nothing for so long is held or unreachable, whatever it did last; each speaks once a second."""
TERMINATED = "ended by SIGTERM"
START_S = 300.0
"""Least time without progress before the second step of a start: reading weights and compiling have no measure of it,
and a limit that suits steps would end them."""
_SHOWN = 12


@dataclass
class Member:
    """What is known of one rank."""

    rank: int
    place: str
    """``stage 0, replica 1; host node-2, pid 4242``."""
    state: Literal["running", "died", "failed", "left"] = "running"
    step: int = 0
    begun: int = 0
    """Steps begun since the start."""
    doing: str = "starting"
    where: str = ""
    """Innermost Python frame of a rank that has done the same for a while."""
    waits: bool = False
    """Whether it waits for other ranks."""
    count: int = -1
    """Things begun so far: what makes progress visible."""
    heard: float = 0.0
    error: str = ""
    code: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"

    @property
    def heartbeat(self) -> str:
        """What it does, in words."""
        return f"{self.doing}{f' ({self.where})' if self.where else ''}"


@dataclass(frozen=True)
class Diagnosis:
    """Why the job ends."""

    kind: Literal["died", "error", "hang"]
    text: str
    """One line: who, where, when."""
    others: tuple[str, ...]
    """What every group of the other ranks was doing."""
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
        """Whether a rank has died or failed, and more news may come."""
        return self._trouble is not None

    def join(self, rank: int, place: str, now: float) -> None:
        """Take note of a rank that is watched from now on."""
        self.members[rank] = Member(rank, place, heard=now)
        self._progress = now

    def record(self, rank: int, news: dict[str, Any], now: float) -> None:
        """Take note of what a rank says that it does."""
        member = self.members[rank]
        member.heard = now
        if (member.step, member.count) != (news["step"], news["count"]):
            self._progress = now
        for name in ("step", "begun", "count", "doing", "where", "waits"):
            setattr(member, name, news[name])

    def failed(self, rank: int, error: str, code: int, now: float) -> None:
        """Take note of a rank that ends with an error of its own; ``code`` 2 is an error that the user can mend."""
        self._end(rank, "failed", now)
        self.members[rank].error, self.members[rank].code = error, code

    def gone(self, rank: int, now: float) -> None:
        """Take note of a connection that ended; whoever did not take leave first has died."""
        if self.members[rank].state == "running":
            self._end(rank, "died", now)

    def left(self, rank: int) -> None:
        """Take note of a rank that is done."""
        self.members[rank].state = "left"

    def _end(self, rank: int, state: Literal["died", "failed"], now: float) -> None:
        self.members[rank].state = state
        self._trouble = now if self._trouble is None else self._trouble

    def extend_deadline(self, seconds: float) -> None:
        """Leave time out of account in which this process itself was held up, as in a suspended job."""
        self._progress += seconds
        for member in self.members.values():
            member.heard += seconds

    def diagnosis(self, now: float, *, terminated: bool = False) -> Diagnosis | None:
        """Return why the job has failed, or None.

        ``terminated``: this process was told to end, so there is no time for more news; nor has the job failed
        where the others were merely told the same.
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
        started = any(member.begun > 1 for member in self.members.values())
        return self.timeout_s if started else max(self.timeout_s, START_S)

    def _in_state(self, state: str) -> list[Member]:
        return [member for _, member in sorted(self.members.items()) if member.state == state]

    def _death(self, died: Sequence[Member]) -> Diagnosis:
        first = max(died, key=lambda member: (not member.waits, -member.rank))
        more = f", and so did {_ranks(died, first)}" if len(died) > 1 else ""
        last = f"last heard of at step {first.step} in {first.heartbeat}"
        text = f"{first} died{more}: killed, or out of host memory; {last}"
        return Diagnosis("died", text, self._others(died), first.step, 1)

    def _error(self, failed: Sequence[Member]) -> Diagnosis:
        """The user's error comes first: others may have failed because that rank was no longer there."""
        first = next((member for member in failed if member.code == 2), failed[0])
        alike = {member.rank for member in failed if member.error == first.error}
        who = "" if first.code == 2 and (0 in alike or len(alike) > 1) else f"{first}, step {first.step}: "
        return Diagnosis("error", f"{who}{first.error}", (), first.step, first.code)

    def _hang(self, running: Sequence[Member], now: float) -> Diagnosis:
        silent = [member for member in running if now - member.heard > SILENT_S]
        busy = [member for member in running if not member.waits and member not in silent]
        culprits = silent or (busy if len(busy) < len(running) else [])
        step = max(member.step for member in running)
        begin = f"no rank got any further for {self._limit:g} s (parallel.timeout_s) at step {step}: "
        if silent:
            text = f"nothing was heard of {silent[0]} for {now - silent[0].heard:.0f} s, last in {silent[0].heartbeat}"
        elif culprits:
            text = f"{culprits[0]} hangs in {culprits[0].heartbeat} while the others wait"
        else:
            text = f"all of them {'wait' if not busy else 'are busy'}, none is plainly the cause"
        more = f"; so it is with {_ranks(culprits, culprits[0])}" if len(culprits) > 1 else ""
        return Diagnosis("hang", f"{begin}{text}{more}", self._others(culprits), step, 1)

    def _others(self, culprits: Iterable[Member]) -> tuple[str, ...]:
        """Return a line for each group of ranks that do the same, the guilty ones left out."""
        known = {member.rank for member in culprits}
        groups: dict[str, list[Member]] = {}
        for rank, member in sorted(self.members.items()):
            if rank not in known and member.state in ("running", "failed"):
                words = member.heartbeat if member.state == "running" else f"failed then: {member.error}"
                groups.setdefault(words, []).append(member)
        lines = [f"{_ranks(group)}: {words}" for words, group in groups.items()]
        missing = [rank for rank in range(self.world) if rank not in self.members]
        lines += [f"{_numbers(missing)}: not watched"] if missing else []
        return (*lines[:_SHOWN], *([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


def _ranks(members: Iterable[Member], apart: Member | None = None) -> str:
    return _numbers([member.rank for member in members if member is not apart])


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
