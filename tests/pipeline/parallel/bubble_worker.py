"""One rank of `test_trace`: the real runner over stages that sleep instead of computing, timed by its recorder."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline.attention import build_plan
from pipeline.model.inputs import StageInputs
from pipeline.parallel.groups import create_groups, fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.trace import Span, chrome_trace, measured_bubble
from pipeline.parallel.traffic import Traffic
from pipeline.parallel.zero3 import Zero3Stage
from tests.pipeline.model.helpers import random_sidecars

RANKS, MICROS, TOKENS, WIDTH, FORWARD_S = 4, 4, 16, 8, 0.12
"""A stage sleeps FORWARD_S a micro-batch forward and twice that back, whatever its number of chunks."""
CASES: Mapping[str, tuple[str, int]] = {"1f1b": ("1f1b", 1), "gpipe": ("gpipe", 1), "interleaved": ("interleaved", 2)}
CPU = torch.device("cpu")


class SleepingStage:
    """Stands in for `Zero3Stage`: hidden states go through unchanged, after a while."""

    def __init__(self, chunks: int) -> None:
        self.engine, self.traffic = SimpleNamespace(device=CPU), Traffic()
        self._forward_s = FORWARD_S / chunks

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        yield

    def forward(self, hidden: torch.Tensor | None, inputs: StageInputs, layers: range | None) -> torch.Tensor:
        time.sleep(self._forward_s)
        out = torch.zeros(1, TOKENS, WIDTH, requires_grad=True) if hidden is None else hidden * 1.0
        return out.sum() if layers == range(-1, 0) else out

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        time.sleep(2 * self._forward_s)
        torch.autograd.backward(output, grad)


def one_step(name: str, topology: Topology, groups: Any, wire: list[int]) -> tuple[float, list[Span], int]:
    schedule, chunks = CASES[name]
    stage = SleepingStage(chunks)
    own: list[range | None] = [None] * chunks
    if topology.last:
        own[-1] = range(-1, 0)  # where the loss is
    runner = Runner(
        cast(Zero3Stage, stage), topology=topology, groups=groups, width=WIDTH, dtype=torch.float32,
        schedule=schedule, chunks=own,
    )  # fmt: skip
    sidecars = random_sidecars(0, 1, padding=0)
    none = torch.zeros(TOKENS, dtype=torch.long)
    micros = [StageInputs(none, none, build_plan("causal", sidecars), none, none[:0])] * MICROS
    wire.clear()
    dist.barrier()
    runner.recorder.begin()
    runner.run(micros, 1.0)
    spans = runner.recorder.take()
    return measured_bubble(spans, CPU), spans, stage.traffic.sent


def main() -> None:
    fill_rank_variables()
    start_processes(60)
    topology = Topology(RANKS, dist.get_rank(), RANKS)
    groups, wire, seen = create_groups(topology), [], {}
    send = dist.isend

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wire.append(tensor.nbytes)
        return send(tensor, *args, **kwargs)

    dist.isend = counted  # type: ignore[assignment]
    for name in CASES:
        bubble, spans, sent = one_step(name, topology, groups, wire)
        of_ranks: list[list[Span]] = [[] for _ in range(RANKS)]
        dist.all_gather_object(of_ranks, spans)
        wires: list[list[int]] = [[] for _ in range(RANKS)]
        dist.all_gather_object(wires, list(wire))
        assert sent == sum(wire)
        trace = json.loads(chrome_trace(of_ranks, topology))
        seen[name] = {"bubble": bubble, "wire": wires, "trace": trace}
    if topology.rank == 0:
        Path(sys.argv[-1]).write_text(json.dumps(seen))
    stop_processes()


if __name__ == "__main__":
    main()
