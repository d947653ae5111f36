"""A timeline of each rank's step: the measured bubble, and a trace for ui.perfetto.dev."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.parallel.schedule import Action
from pipeline.parallel.topology import Topology
from pipeline.parallel.traffic import Traffic


class Span(NamedTuple):
    """One activity of a rank; times are seconds since its recorder began."""

    kind: str
    """forward, backward, wait, optimizer or data."""
    name: str
    start: float
    end: float
    action: Action | None
    counts: dict[str, int]
    """Traffic counted meanwhile (see `Traffic`)."""


class Recorder:
    """Records spans between `begin` and `take`; free of cost otherwise.

    On a GPU, times are those of its compute stream, from events that are read after the step.
    """

    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        """Record spans on a device; ``traffic`` is read around each of them."""
        self._cuda, self._traffic = device.type == "cuda", traffic
        self._began: Any = None
        self._raw: list[tuple[str, str, Any, Any, Action | None, dict[str, int]]] = []

    @property
    def recording(self) -> bool:
        """Whether spans are recorded."""
        return self._began is not None

    def begin(self) -> None:
        """Start to record; earlier spans are dropped."""
        self._raw, self._began = [], self._now()

    @contextmanager
    def span(self, kind: str, name: str, action: Action | None = None) -> Iterator[None]:
        """Record the body of the ``with`` statement."""
        if not self.recording:
            yield
            return
        before, start = asdict(self._traffic), self._now()
        yield
        counts = {key: count - before[key] for key, count in asdict(self._traffic).items() if count != before[key]}
        self._raw.append((kind, name, start, self._now(), action, counts))

    def take(self) -> list[Span]:
        """Stop and return the recorded spans."""
        if self._cuda and self._raw:
            self._raw[-1][3].synchronize()
        spans = [
            Span(kind, name, self._since(start), self._since(end), action, counts)
            for kind, name, start, end, action, counts in self._raw
        ]
        self._raw, self._began = [], None
        return spans

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _since(self, mark: Any) -> float:
        return float(self._began.elapsed_time(mark) / 1000 if self._cuda else mark - self._began)


def measured_bubble(spans: Sequence[Span], device: torch.device) -> float:
    """Return the mean idle share of ranks between the start of a step and its last backward. Collective.

    Forwards and backwards count as busy, including the gathers inside them; the optimizer step is excluded, as in
    theory.
    """
    ran = [span for span in spans if span.kind in ("forward", "backward")]
    busy = torch.tensor([sum(span.end - span.start for span in ran)], dtype=torch.float64, device=device)
    last = torch.tensor([max(span.end for span in ran)], dtype=torch.float64, device=device)
    dist.all_reduce(busy)
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    return 1.0 - float(busy) / (dist.get_world_size() * float(last))


def chrome_trace(of_ranks: Sequence[Sequence[Span]], topology: Topology) -> bytes:
    """Return the spans of all ranks as a Chrome trace: a process a rank, arrows for messages between stages."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(of_ranks):
        place = Topology(topology.world, rank, topology.pp)
        title = f"stage {place.stage}, dp rank {place.dp_rank} (rank {rank})"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": title}})
        for span in spans:
            events += _events(span, place)
    ends = Counter(event.get("id") for event in events)
    events = [
        event for event in events if ends[event.get("id")] != 1
    ]  # drop arrows without a second end: tokens, losses and embeddings
    return (json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n").encode()


def _events(span: Span, place: Topology) -> Iterator[dict[str, Any]]:
    where = {"pid": place.rank, "tid": 0}
    times = {"ts": 1e6 * span.start, "dur": 1e6 * (span.end - span.start)}
    args = dict(span.counts)
    if span.action is not None:
        args |= {"micro_batch": span.action.microbatch, "virtual_stage": span.action.virtual_stage}
    yield {"ph": "X", "name": span.name, "cat": span.kind, **where, **times, "args": args}
    if span.action is None or span.kind == "wait":
        return
    forth = 1 if span.action.kind == "F" else -1
    at = place.stage + span.action.virtual_stage * place.pp
    for phase, edge, moment in (("f", at - forth, span.start), ("s", at, span.end)):
        message = f"{span.action.kind}{span.action.microbatch} from {edge}, dp rank {place.dp_rank}"
        yield {
            "ph": phase, "bp": "e", "name": "message", "cat": "message", "id": message, "ts": 1e6 * moment, **where,
        }  # fmt: skip
