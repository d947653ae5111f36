"""The head's loss against a naive one: time and peak memory of forward and backward, each method in its own process.

Run from the repository root: ``python -m benchmarks.loss [--rows 4096] [--width 1024] [--vocabulary 32064]
[--supervised 0.23] [--json OUT]``. ``naive`` makes the logits of every row, ``selected`` of the supervised rows,
``native`` is torch's own chunked loss on them, and ``ours`` what training uses. It measures bf16 on CUDA, else fp32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from pipeline.model.inputs import IGNORE
from pipeline.model.loss import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error (norm over norm) of the weight's gradient allowed against the naive method."""


@dataclass(frozen=True)
class Case:
    """A packed row's worth of hidden states and a head."""

    rows: int
    width: int
    vocabulary: int
    supervised: float

    def draw(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states, weight and labels."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(self.rows, self.width, generator=generator).to(device, dtype).requires_grad_()
        w = (torch.randn(self.vocabulary, self.width, generator=generator) * 0.02).to(device, dtype).requires_grad_()
        y = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        y[torch.rand(self.rows, generator=generator) > self.supervised] = IGNORE
        return h, w, y.to(device)


@dataclass(frozen=True)
class Measured:
    """One method on one case."""

    method: str
    ms: float
    peak_mib: float
    """Peak memory above the inputs."""
    loss: float
    error: float
    """Error of the weight's gradient, relative to the naive method."""


def _naive(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((h @ w.T).float(), y, reduction="sum", ignore_index=IGNORE)


def _kept(h: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = (y != IGNORE).nonzero().squeeze(1)
    return h.index_select(0, kept), y[kept]


def _selected(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h, y = _kept(h, y)
    return F.cross_entropy((h @ w.T).float(), y, reduction="sum")


def _native(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h, y = _kept(h, y)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h, w, y, reduction="sum", options=options)


def _ours(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h, y = _kept(h, y)
    return linear_cross_entropy(h, w, y)


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "naive": _naive,
    "selected": _selected,
    "native": _native,
    "ours": _ours,
}


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(method: str, case: Case, device: str, repeats: int) -> Measured:
    """Measure one method in its own process, because the peak memory of a CPU process never falls."""
    torch.set_num_threads(1)
    h, w, y = case.draw(device)
    before = _peak_mib(device)
    times, loss = [], torch.zeros(())
    for _ in range(repeats + 1):  # the first warms up
        h.grad = w.grad = None
        start = time.perf_counter()
        loss = METHODS[method](h, w, y)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak, ms = _peak_mib(device) - before, 1e3 * statistics.median(times[1:])
    assert w.grad is not None
    mine, w.grad = w.grad.float(), None
    _naive(h, w, y).backward()
    assert w.grad is not None
    error = float((mine - w.grad.float()).norm() / w.grad.float().norm())
    return Measured(method, ms, peak, loss.item(), error)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a method's gradient is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--supervised", type=float, default=0.23)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    case = Case(options.rows, options.width, options.vocabulary, options.supervised)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for method in METHODS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (method, case, device, options.repeats)))
    first = results[0]
    print(f"{case} on {device}")
    print("method       ms  x naive   peak MiB  x naive      error")
    for r in results:
        ratios = (r.ms / first.ms, r.peak_mib / first.peak_mib)
        print(f"{r.method:8} {r.ms:7.1f} {ratios[0]:8.2f} {r.peak_mib:10.0f} {ratios[1]:8.2f} {r.error:10.1e}")
    if options.json:
        options.json.write_text(json.dumps({"case": asdict(case), "results": [asdict(r) for r in results]}, indent=1))
    limit = TOLERANCE[torch.bfloat16 if device == "cuda" else torch.float32]
    return int(any(r.error > limit for r in results))


if __name__ == "__main__":
    sys.exit(main())
