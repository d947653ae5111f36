"""Continuous batching: one thread runs the model; requests join and leave the batch between two steps.

Each turn of the loop prefills at most one waiting request, alone and under its own policy mask, and then takes all
running requests one token further. A request is admitted only if the cache has room for its prompt and its longest
answer, so no running request is ever evicted.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from data_prep.common.errors import UserError, one_line
from pipeline.server.sampling import Choice, Sampling, choose
from pipeline.serving.steps import Prefilled, Prepared, StepModel

log = logging.getLogger(__name__)

Reason: TypeAlias = Literal["stop", "length", "cancelled"]
UNHEALTHY_FAILURES = 3
"""So many failures in a row mean that the process should be replaced, as after a fault of the GPU."""
SETTLED_S = 1.0
"""How long :meth:`Engine.close` waits for the thread after its last step."""


class Busy(Exception):  # noqa: N818 - an outcome, not a fault
    """No place is left; ``retry_after_s`` estimates when one will be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server is busy: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Stopping(Exception):  # noqa: N818
    """The engine takes no new requests."""


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    reason: Reason


@dataclass(frozen=True)
class Failed:
    """The last event of a request that cannot be answered."""

    message: str
    user: bool
    """Whether the request is at fault."""


Event: TypeAlias = Choice | Finished | Failed
Listener: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True)
class Work:
    """What a request asks of the model."""

    prepared: Prepared
    max_new_tokens: int
    sampling: Sampling
    ignored_ends: frozenset[int] = frozenset()
    """End tokens that do not end this answer (``ignore_eos``)."""


@dataclass(eq=False)
class Ticket:
    """The place of one request, from its arrival to its end."""

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    """When its prefill began; None while it waits."""
    first_token: float | None = None
    finished: float | None = None
    cancelled: bool = False
    generated: int = 0
    """Tokens so far."""


@dataclass
class _Running:
    ticket: Ticket
    work: Work
    listener: Listener
    random: random.Random
    position: int = 0
    last: int = 0

    @property
    def tokens(self) -> int:
        """Cache rows must hold so many tokens: the prompt and the answer."""
        return len(self.work.prepared) + self.work.max_new_tokens


class Engine:
    """Runs requests on one model. All methods may be called from any thread."""

    def __init__(self, steps: StepModel, *, batch: int = 16, queue: int = 64, cache_tokens: int | None = None) -> None:
        """Start the engine's thread.

        Args:
            steps: the model.
            batch: requests that run at once.
            queue: further requests that may wait.
            cache_tokens: limit of the cache in tokens, padding included; None: no limit.
        """
        self.steps, self.batch, self.queue, self.cache_tokens = steps, batch, queue, cache_tokens
        self._ends = frozenset(steps.model.export_config.eos_ids)
        self._wake = threading.Condition()
        self._tickets: set[Ticket] = set()
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._cache = steps.cache()
        self._stopping = self._closed = False
        self._failures = 0
        """Prefills and steps that have failed in a row."""
        self._mean_s = 1.0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Accepted requests that are not in the batch yet."""
        return max(0, len(self._tickets) - len(self._running))

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache has allocated, padding included."""
        rows, tokens = self._cache.capacity
        return rows * tokens

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` or :meth:`close` was called."""
        return self._stopping

    @property
    def health(self) -> Literal["ok", "stopping", "failing"]:
        """Whether requests are taken and answered."""
        if self._stopping:
            return "stopping"
        return "ok" if self._thread.is_alive() and self._failures < UNHEALTHY_FAILURES else "failing"

    def reserve(self) -> Ticket:
        """Take a place for a request that has just arrived; give it back with :meth:`release`.

        Raises:
            Busy: the batch and the queue are full.
            Stopping: the engine is being stopped.
        """
        with self._wake:
            if self._stopping:
                raise Stopping
            if len(self._tickets) >= self.batch + self.queue:
                raise Busy(max(1, round(self._mean_s * (self.queue + 1) / self.batch)))
            ticket = Ticket()
            self._tickets.add(ticket)
            return ticket

    def submit(self, ticket: Ticket, work: Work, listener: Listener) -> None:
        """Queue a request.

        Args:
            ticket: from :meth:`reserve`.
            work: the request.
            listener: called on the engine's thread with each token and the last event; must return at once.

        Raises:
            UserError: the cache can never hold the request.
        """
        request = _Running(ticket, work, listener, work.sampling.generator())
        if self.cache_tokens is not None and request.tokens > self.cache_tokens:
            raise UserError(
                f"the prompt takes {len(work.prepared)} tokens and the answer up to {work.max_new_tokens}, more than "
                f"this server's cache of {self.cache_tokens}: shorten the conversation, or ask for fewer new tokens"
            )
        with self._wake:
            self._waiting.append(request)
            self._wake.notify()

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next step, if it has not ended; its last event is then ``cancelled``."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def release(self, ticket: Ticket) -> None:
        """Give the place back. A request that still runs is cancelled."""
        self.cancel(ticket)
        with self._wake:
            self._tickets.discard(ticket)

    def stop(self) -> None:
        """Take no new requests; those accepted are finished."""
        self._stopping = True

    @property
    def idle(self) -> bool:
        """Whether no accepted request is left."""
        return not self._tickets

    def close(self) -> None:
        """End the thread; requests that still run are cancelled."""
        with self._wake:
            self._stopping = self._closed = True
            for ticket in self._tickets:
                ticket.cancelled = True
            self._wake.notify()
        self._thread.join(SETTLED_S)

    def _loop(self) -> None:
        while self._wait():
            self._drop_cancelled()
            request = self._next()
            if request is not None:
                self._begin(request)
            if self._running:
                self._step()

    def _wait(self) -> bool:
        """Wait for work; return False when the engine is closed and nothing is left to tell anyone."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._running or self._closed)
            return bool(self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [request for request in self._waiting if request.ticket.cancelled]
            self._waiting = deque(request for request in self._waiting if not request.ticket.cancelled)
        for request in gone:
            self._tell(request, Finished("cancelled"))
        for row in range(len(self._running) - 1, -1, -1):
            if self._running[row].ticket.cancelled:
                self._end(row, Finished("cancelled"))

    def _next(self) -> _Running | None:
        """Return the first waiting request if the batch and the cache have room for it."""
        with self._wake:
            if not self._waiting or len(self._running) >= self.batch:
                return None
            longest = max(request.tokens for request in (*self._running, self._waiting[0]))
            tokens = (len(self._running) + 1) * longest
            if self._running and self.cache_tokens is not None and tokens > self.cache_tokens:
                return None
            return self._waiting.popleft()

    def _begin(self, request: _Running) -> None:
        """Prefill a request; its first token comes with it."""
        request.ticket.started = time.monotonic()
        try:
            first = self.steps.prefill(request.work.prepared)
            (choice,) = choose(first.logits[None], [request.work.sampling], [request.random])
            self._join(request, first, choice)
            self._failures = 0
        except Exception as error:
            self._fail(request, error)

    def _join(self, request: _Running, first: Prefilled, choice: Choice) -> None:
        request.position = first.next_position
        if (last := self._take(request, choice)) is not None:
            self._tell(request, last)
            return
        self._cache.add(first, request.tokens)
        self._running.append(request)

    def _step(self) -> None:
        try:
            logits = self.steps.decode(
                self._cache, [one.last for one in self._running], [one.position for one in self._running]
            )
            choices = choose(
                logits, [one.work.sampling for one in self._running], [one.random for one in self._running]
            )
            self._failures = 0
        except Exception as error:
            self._fail_all(error)
            return
        for row in range(len(choices) - 1, -1, -1):
            self._running[row].position += 1
            if (last := self._take(self._running[row], choices[row])) is not None:
                self._end(row, last)

    def _take(self, request: _Running, choice: Choice) -> Finished | None:
        """Hand out a token; return the last event if the answer is complete."""
        ticket = request.ticket
        ticket.first_token = ticket.first_token or time.monotonic()
        ticket.generated += 1
        request.last = choice.id
        self._tell(request, choice)
        if choice.id in self._ends - request.work.ignored_ends:
            return Finished("stop")
        return Finished("length") if ticket.generated >= request.work.max_new_tokens else None

    def _end(self, row: int, event: Finished | Failed) -> None:
        """Remove a request from the batch; the last row takes its place, as in the cache."""
        request = self._running[row]
        self._cache.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        self._tell(request, event)

    def _tell(self, request: _Running, event: Event) -> None:
        if not isinstance(event, Choice):
            ticket = request.ticket
            ticket.finished = time.monotonic()
            if ticket.started is not None:
                self._mean_s += 0.1 * (ticket.finished - ticket.started - self._mean_s)
        try:
            request.listener(event)
        except Exception:  # such as a closed event loop: the request has nobody left to hear it
            request.ticket.cancelled = True

    def _fail(self, request: _Running, error: Exception) -> None:
        if isinstance(error, UserError):
            self._tell(request, Failed(one_line(error), user=True))
            return
        self._failures += 1
        log.error("prefill failed", exc_info=error)
        self._tell(request, Failed(_cause(error), user=False))

    def _fail_all(self, error: Exception) -> None:
        """Give up all running requests; the cache is dropped, because a failed step leaves it half written."""
        log.error("a decoding step of %d requests failed", len(self._running), exc_info=error)
        self._failures += 1
        failed, self._running = self._running, []
        self._cache.clear()
        for request in failed:
            self._tell(request, Failed(_cause(error), user=False))


def _cause(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the server's GPU memory is exhausted: try again later; its operator can lower --batch or --cache-tokens"
    return f"the server failed ({type(error).__name__}): its log tells more"
