"""One rank of `benchmarks.simulator`: timed steps whose layers sleep and whose messages arrive late."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pipeline_worker import LAYERS, Bench
from benchmarks.pipeline_worker import Case as Engine
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.partition import split_stages
from pipeline.parallel.schedule import Action
from pipeline.parallel.simulation import orders, simulate
from pipeline.parallel.trace import Span

WARM_UP, MEASURED = 1, 2


@dataclass(frozen=True)
class Case:
    """A pipeline with injected latencies."""

    pp: int
    schedule: str
    microbatches: int
    stage_s: tuple[float, ...]
    """Seconds that each stage sleeps in the forward of a micro-batch; a backward sleeps twice as long."""
    message_s: float = 0.0
    """Seconds by which every message arrives later."""
    virtual_stages: int = 1


EVEN, UNEVEN = (0.2, 0.2, 0.2, 0.2), (0.2, 0.3, 0.15, 0.25)
CASES = (  # two stages first: DeepSpeed numbers modules, equally on the ranks of a stage until their stages differ
    Case(2, "1f1b", 8, (0.0, 0.0)),
    Case(2, "1f1b", 4, (0.3, 0.15), message_s=0.2),
    Case(4, "1f1b", 4, UNEVEN),
    Case(4, "gpipe", 4, UNEVEN),
    Case(4, "interleaved", 4, EVEN, virtual_stages=2),
    Case(4, "1f1b", 4, EVEN, message_s=0.3),
)


class Asleep(torch.autograd.Function):
    """Passes hidden states through, and their gradient, after a while."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:  # type: ignore[override]
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grads[0], None


def fall_asleep(module: nn.Module, args: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
    return Asleep.apply(hidden, seconds)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Late:
    """A message that a thread sends."""

    sent: Future[Any]

    def wait(self) -> None:
        self.sent.result().wait()

    def is_completed(self) -> bool:
        return self.sent.done() and bool(self.sent.result().is_completed())


@contextmanager
def late_messages(seconds: float) -> Iterator[None]:
    """Send every message so much later, in order, while the sender goes on."""
    send = dist.isend
    if not seconds:
        yield
        return

    def later(due: float, *args: Any, **kwargs: Any) -> Any:
        time.sleep(max(0.0, due - time.perf_counter()))
        return send(*args, **kwargs)

    with ThreadPoolExecutor(1) as wire:
        dist.isend = lambda *args, **kwargs: Late(  # type: ignore[assignment, return-value]
            wire.submit(later, time.perf_counter() + seconds, *args, **kwargs)
        )
        try:
            yield
        finally:
            dist.isend = send


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """Return the seconds of a step, from its start to its last backward, and two predictions of the simulator.

    ``predicted_s`` knows what each action of the step took, as `mma estimate` assumes it; ``ahead_s`` only what actions
    took on average in earlier steps without sleep, and the sleep.
    """
    engine = Engine("stages", case.pp, case.microbatches)
    stage, runner, module = bench.engine(engine, schedule=case.schedule, virtual_stages=case.virtual_stages)
    rows = bench.rows(engine)

    def step() -> list[Span]:
        dist.barrier()
        runner.recorder.begin()
        runner.run(rows, 1e-4)
        spans = [span for span in runner.recorder.take() if span.kind in ("forward", "backward")]
        stage.step(1e-4)
        return spans

    for _ in range(WARM_UP):
        step()
    bare = everywhere([step() for _ in range(MEASURED)])
    layers = list(module.model.layers.values())  # type: ignore[union-attr, operator]
    for layer in layers:
        layer.register_forward_hook(
            partial(fall_asleep, seconds=case.stage_s[bench.grids[case.pp].stage] / len(layers))
        )
    with late_messages(case.message_s):
        (spans,) = zip(*everywhere([step()]), strict=True)
    dp = bench.grids[case.pp].dp
    return asdict(case) | {
        "measured_s": max(span.end for rank in spans for span in rank),
        "ahead_s": predict(case, with_sleep(case, mean_costs(bare, dp))),
        "predicted_s": max(predict(case, own_costs(spans[dp_rank::dp])) for dp_rank in range(dp)),
    }


def everywhere(steps: list[list[Span]]) -> list[list[list[Span]]]:
    """Return the spans of every rank, by step. Collective."""
    found: list[list[list[Span]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, steps)
    return found


Costs = Callable[[int, Action], float]
"""(stage, action) -> seconds."""


def mean_costs(ranks: Sequence[Sequence[Sequence[Span]]], dp: int) -> Costs:
    """Return what actions took on average, over steps, micro-batches and data-parallel ranks."""
    times = defaultdict(list)
    for rank, steps in enumerate(ranks):
        for span in (span for spans in steps for span in spans):
            assert span.action is not None
            times[rank // dp, span.action._replace(microbatch=0)].append(span.end - span.start)
    return lambda stage, action: sum(own := times[stage, action._replace(microbatch=0)]) / len(own)


def own_costs(stages: Sequence[Sequence[Span]]) -> Costs:
    """Return what each action of one pipeline took in one step."""
    took = {(stage, span.action): span.end - span.start for stage, spans in enumerate(stages) for span in spans}
    return lambda stage, action: took[stage, action]


def with_sleep(case: Case, bare: Costs) -> Costs:
    """Return what actions should take: what they took without sleep, plus the sleep."""
    layers = split_stages(LAYERS, case.pp, case.virtual_stages)

    def cost(stage: int, action: Action) -> float:
        share = len(layers[stage][action.virtual_stage]) / sum(map(len, layers[stage]))
        return case.stage_s[stage] * share * (1 if action.kind == "F" else 2) + bare(stage, action)

    return cost


def predict(case: Case, costs: Costs) -> float:
    """Return the simulated seconds of a step."""
    of_stages = orders(case.schedule, case.pp, case.microbatches, case.virtual_stages)
    return simulate(of_stages, costs, case.virtual_stages, message=case.message_s).makespan


def main() -> None:
    """Measure every case; rank 0 writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    fill_rank_variables()
    start_processes(600)
    bench, results = Bench(), []
    for case in CASES:
        results.append(measure(bench, case))
        if bench.rank == 0:
            options.out.write_text(json.dumps(results), encoding="utf-8")
    stop_processes()


if __name__ == "__main__":
    main()
