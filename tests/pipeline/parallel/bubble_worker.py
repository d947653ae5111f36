"""One rank of `test_trace`: ZeRO-3 stages whose decoder layers sleep besides computing, timed by the recorder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.simulator_worker import fall_asleep
from pipeline.parallel.groups import Groups, create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.topology import Topology
from pipeline.parallel.trace import Span, chrome_trace, measured_bubble
from tests.pipeline.parallel.grid_worker import LR, RANKS, Case, Job, micro_batch, number_from_zero

LONGER = float(os.environ.get("BUBBLE_SLEEP", "1"))
"""Sleeps so many times as long: what a machine adds to a step is then a smaller share of it."""
MICROS, FORWARD_S = 4, {2: 0.25 * LONGER, 4: 0.2 * LONGER}
"""Seconds that a stage of a grid sleeps in a forward, and half of those in a backward, whatever its layers."""
CASES: Mapping[str, Case] = {
    "pp2-1f1b": Case(2, gathered_fraction=0.0, reduce_once=False),
    "pp2-interleaved": Case(2, "interleaved"),
    "pp4-1f1b": Case(4),
    "pp4-gpipe": Case(4, "gpipe"),
    "pp4-interleaved": Case(4, "interleaved"),
}
ROW = micro_batch(0, 1)  # text: an image's tower would run on the first stage alone
CPU = torch.device("cpu")


def one_step(case: Case, topology: Topology, groups: Groups, wire: list[int]) -> tuple[float, list[Span]]:
    """Time a step, after one without sleep; ``wire`` is left with the size of each of its messages."""
    number_from_zero()
    job = Job(case, topology, groups)
    microbatches = [ROW] * MICROS
    job.runner.run(microbatches, 1.0)
    job.stage.step(LR)
    layers = list(job.stage.module.model.layers.values())  # type: ignore[union-attr, operator]
    for layer in layers:
        layer.register_forward_hook(partial(fall_asleep, seconds=FORWARD_S[case.pp] / len(layers)))
    job.stage.traffic.take()
    wire.clear()
    dist.barrier()
    job.runner.recorder.begin()
    job.runner.run(microbatches, 1.0)
    spans = job.runner.recorder.take()
    assert job.stage.traffic.take().sent == sum(wire)
    return measured_bubble(spans, CPU), spans


def main() -> None:
    fill_rank_variables()
    start_processes(60)
    grids = {pp: Topology(RANKS, dist.get_rank(), pp) for pp in (2, 4)}
    groups = {pp: create_groups(topology) for pp, topology in grids.items()}
    wire: list[int] = []
    seen = {}
    send = dist.isend

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wire.append(tensor.nbytes)
        return send(tensor, *args, **kwargs)

    dist.isend = counted  # type: ignore[assignment]
    for name, case in CASES.items():
        bubble, spans = one_step(case, grids[case.pp], groups[case.pp], wire)
        of_ranks: list[list[Span]] = [[] for _ in range(RANKS)]
        dist.all_gather_object(of_ranks, spans)
        wires: list[list[int]] = [[] for _ in range(RANKS)]
        dist.all_gather_object(wires, list(wire))
        trace = json.loads(chrome_trace(of_ranks, grids[case.pp]))
        seen[name] = {"bubble": bubble, "wire": wires, "trace": trace}
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(seen))
    stop_processes()


if __name__ == "__main__":
    main()
