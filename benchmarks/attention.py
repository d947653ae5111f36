"""Attention under the MMA mask: time, memory and correctness of every backend on packed rows.

Run from the repository root: ``python -m benchmarks.attention [--kinds ...] [--tokens ...] [--json OUT]``. On a CUDA
machine it measures bf16 at three shapes of heads, elsewhere fp32 at one. ``causal`` is the same kernel as ``runsplit``
under the causal mask (on CUDA: one variable-length flash call without any gather), ``dense`` the library's attention
with a boolean mask of T x T.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.rows import KINDS, make_row
from pipeline.attention import AttentionPlan, attend, build_plan
from pipeline.masks import Sidecars

DENSE_LIMIT = 8192
CHECK_TOKENS = 2048
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error (norm over norm) allowed against float64 on the same inputs."""


TABLES = {"causal": "runs", "runsplit": "runs", "lse": "rectangles", "flex": "block_mask", "dense": "dense_mask"}
"""The part of a plan that each backend reads: built at first use, and timed with the plan."""


class Heads(NamedTuple):
    """Query heads, key heads, head size."""

    query: int
    key: int
    size: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key} x {self.size}"


@dataclass(frozen=True)
class Result:
    """One line of the table; times are medians in milliseconds."""

    kind: str
    tokens: int
    heads: str
    backend: str
    forward_ms: float
    both_ms: float
    """Forward and backward."""
    plan_ms: float
    peak_mib: float
    """Peak device memory above the inputs during forward and backward; 0 if the device does not count it."""
    pairs: int
    tflops: float
    """Forward and backward, over allowed pairs only."""
    vs_causal: float
    """Forward and backward time relative to ``causal``; 0 if that was not measured."""
    faster_than_dense: float


@dataclass(frozen=True)
class Inputs:
    """Leaf tensors [1, H, T, D] in the memory layout of a decoder's projections, and the gradient of the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def draw(cls, heads: Heads, tokens: int, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Draw standard normal inputs."""
        generator = torch.Generator().manual_seed(seed)

        def leaf(count: int) -> torch.Tensor:
            values = torch.randn(1, tokens, count, heads.size, generator=generator).to(device, dtype)
            return values.transpose(1, 2).requires_grad_()

        return cls(leaf(heads.query), leaf(heads.key), leaf(heads.key), leaf(heads.query).detach())

    def double(self) -> Inputs:
        """Return the same values in float64."""
        q, k, v = (x.detach().double().requires_grad_() for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.gradient.double())

    def forward(self, plan: AttentionPlan, backend: str) -> torch.Tensor:
        """Attend."""
        return attend(self.q, self.k, self.v, plan, backend=backend)

    def both(self, plan: AttentionPlan, backend: str) -> list[torch.Tensor]:
        """Attend, and return the output and the gradients of q, k and v."""
        out = self.forward(plan, backend)
        return [out, *torch.autograd.grad(out, (self.q, self.k, self.v), self.gradient)]


def relative_errors(kind: str, heads: Heads, backend: str, device: str, dtype: torch.dtype) -> list[float]:
    """Return the errors of out, dq, dk and dv against dense float64 attention, without padding."""
    sidecars = make_row(kind, CHECK_TOKENS)
    plan = build_plan("mma", sidecars).to(device)
    inputs = Inputs.draw(heads, CHECK_TOKENS, device, dtype)
    inputs.gradient[:, :, (sidecars.segment == 0).to(device)] = 0
    measured, exact = inputs.both(plan, backend), inputs.double().both(plan, "dense")
    real = (sidecars.segment > 0).to(device)
    pairs = ((got.double()[:, :, real], want[:, :, real]) for got, want in zip(measured, exact, strict=True))
    return [float(((got - want).norm() / want.norm()).detach()) for got, want in pairs]


def milliseconds(work: Callable[[], object], clock: str, seconds: float) -> float:
    """Return the median time of ``work`` over about ``seconds`` of repeats (3 to 50), after two to warm up.

    ``clock`` is ``cuda`` (events), ``wall``, or ``process``: the processor time of this process, which other work on
    the machine does not count into.
    """
    measured = {"cuda": _cuda_time, "wall": _wall_time, "process": _process_time}[clock]
    first = max(measured(work), measured(work))
    repeats = min(50, max(3, int(seconds * 1e3 / max(first, 1e-3))))
    return statistics.median(measured(work) for _ in range(repeats))


def _wall_time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _process_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def _cuda_time(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def peak_mib(work: Callable[[], object], device: str) -> float:
    """Return the peak device memory of ``work`` above the current level."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ready_plan(sidecars: Sidecars, backend: str, device: str) -> AttentionPlan:
    """Build the plan with everything the backend needs, on the device."""
    plan = build_plan("causal" if backend == "causal" else "mma", sidecars).to(device)
    getattr(plan, TABLES[backend])
    if device == "cuda":
        torch.cuda.synchronize()
    return plan


def measure(kind: str, tokens: int, heads: Heads, options: argparse.Namespace) -> Iterator[Result]:
    """Yield one result per backend; ``causal`` and ``dense`` come first because the others report ratios to them."""
    sidecars, dtype = make_row(kind, tokens), options.dtype
    inputs = Inputs.draw(heads, tokens, options.device, dtype)
    both_ms: dict[str, float] = {}
    for backend in sorted(options.backends, key=lambda name: ("causal", "dense", name).index(name)):
        if backend == "dense" and tokens > DENSE_LIMIT:
            continue
        kernel = "runsplit" if backend == "causal" else backend
        plan = ready_plan(sidecars, backend, options.device)
        inputs.both(plan, kernel)  # builds what is built once: the dense mask, the compiled kernel
        with torch.no_grad():
            forward = milliseconds(partial(inputs.forward, plan, kernel), options.clock, options.seconds)
        both = milliseconds(partial(inputs.both, plan, kernel), options.clock, options.seconds)
        both_ms[backend] = both
        yield Result(
            kind=kind,
            tokens=tokens,
            heads=str(heads),
            backend=backend,
            forward_ms=forward,
            both_ms=both,
            plan_ms=milliseconds(partial(ready_plan, sidecars, backend, options.device), "wall", 0.1),
            peak_mib=peak_mib(partial(inputs.both, plan, kernel), options.device),
            pairs=plan.pairs,
            tflops=14 * heads.query * heads.size * plan.pairs / both / 1e9,
            vs_causal=both / both_ms["causal"] if "causal" in both_ms else 0.0,
            faster_than_dense=both_ms["dense"] / both if "dense" in both_ms else 0.0,
        )


COLUMNS = (
    *("row", "tokens", "heads", "backend", "forward ms", "fwd + bwd ms", "x causal", "dense / this", "TFLOP/s"),
    *("peak MiB", "plan ms"),
)


def table_line(result: Result) -> str:
    """Return a result as a row of the Markdown table."""
    ratios = [f"{x:.2f}" if x else "-" for x in (result.vs_causal, result.faster_than_dense)]
    memory = f"{result.peak_mib:,.0f}" if result.peak_mib else "-"
    times = [f"{x:.2f}" for x in (result.forward_ms, result.both_ms)]
    cells = [result.kind, f"{result.tokens:,}", result.heads, result.backend, *times, *ratios]
    return "| " + " | ".join([*cells, f"{result.tflops:.3g}", memory, f"{result.plan_ms:.2f}"]) + " |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    cuda = torch.cuda.is_available()
    backends = ["causal", "dense", "runsplit", "lse"]
    sizes = [4096, 8192, 16384, 32768] if cuda else [2048, 4096, 8192, 16384, 32768]
    heads = ["32,8,128", "32,32,96", "16,8,128"] if cuda else ["8,8,64"]
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=sizes)
    parser.add_argument("--heads", nargs="+", default=heads, metavar="H,H_KV,D")
    parser.add_argument("--backends", nargs="+", default=backends, choices=[*backends, "flex"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3 if cuda else 2.0, help="time per measurement")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write environment and results here")
    parser.add_argument("--process-time", action="store_true", help="on the CPU, count only this process's time")
    options = parser.parse_args(argv)
    options.clock = "cuda" if options.device == "cuda" else "process" if options.process_time else "wall"
    options.heads = [Heads(*map(int, text.split(","))) for text in options.heads]
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


def check(options: argparse.Namespace) -> dict[str, list[float]]:
    """Compare every backend with float64 before timing; exit with a message if one is wrong."""
    errors = {}
    for heads in options.heads:
        for kind in options.kinds:
            for backend in (name for name in options.backends if name != "causal"):
                found = relative_errors(kind, heads, backend, options.device, options.dtype)
                errors[f"{backend}, {kind}, {heads}"] = found
                if max(found) > TOLERANCE[options.dtype]:
                    sys.exit(f"wrong: {backend} on {kind}, heads {heads}: relative errors {found}")
    worst = max(max(found) for found in errors.values())
    print(f"correct: {len(errors)} checks against float64, worst relative error {worst:.1e} ({options.dtype})\n")
    return errors


def environment(options: argparse.Namespace) -> dict[str, str | int]:
    """Describe the machine for the record."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    return {"torch": torch.__version__, "device": name, "dtype": str(options.dtype), "threads": torch.get_num_threads()}


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print the table, and optionally write JSON."""
    options = parse(argv)
    about = environment(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    record: dict[str, Any] = {"environment": about, "errors": check(options), "results": []}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * 4}{'---:|' * (len(COLUMNS) - 4)}", flush=True)
    for heads in options.heads:
        for kind in options.kinds:
            for tokens in options.tokens:
                for result in measure(kind, tokens, heads, options):
                    print(table_line(result), flush=True)
                    record["results"].append(asdict(result))
                    if options.json is not None:  # after every line, so that an interrupted run keeps what it has
                        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
