"""Time to build the plan of a packed row, and to prove its mask, against the row's length.

Run from the repository root: ``python -m benchmarks.plan [--tokens ...]``. CPU only: plans are built beside training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from benchmarks.attention import milliseconds
from benchmarks.rows import KINDS, make_row
from pipeline.attention import AttentionPlan, build_plan
from pipeline.attention.runs import RunSplit
from pipeline.masks import Sidecars, prove

COLUMNS = (
    "row",
    "tokens",
    "plan + tables ms",
    "block mask ms",
    "proof of 32 layers ms",
    "gathered keys / token",
    "tables KiB",
)


def with_tables(sidecars: Sidecars) -> AttentionPlan:
    """Build what the ``runsplit`` backend needs."""
    plan = build_plan("mma", sidecars)
    assert plan.runs.batches
    return plan


def table_bytes(runs: RunSplit) -> int:
    """Return the device memory of a plan in bytes."""
    gathers = [gather for gather in (runs.queries, runs.outputs, runs.keys) if gather is not None]
    tensors = [tensor for gather in gathers for tensor in (gather.rows, gather.bag, gather.offsets)]
    tensors += [tensor for batch in runs.batches for tensor in (batch.cu_q, batch.cu_k)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def lines(kinds: list[str], sizes: list[int]) -> Iterator[str]:
    """Yield the table, line by line."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---|{'---:|' * (len(COLUMNS) - 1)}"
    for kind in kinds:
        for tokens in sizes:
            sidecars = make_row(kind, tokens)
            plan = with_tables(sidecars)
            times = [
                milliseconds(work, "process", 0.5)
                for work in (
                    partial(with_tables, sidecars),
                    lambda row=sidecars: build_plan("mma", row).block_mask,
                    partial(prove, "mma", sidecars, 32),
                )
            ]
            cells = [kind, f"{tokens:,}", *(f"{time:.2f}" for time in times), f"{plan.gather_ratio:.2f}"]
            yield f"| {' | '.join(cells)} | {table_bytes(plan.runs) / 1024:,.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 131072])
    options = parser.parse_args()
    for line in lines(options.kinds, options.tokens):
        print(line, flush=True)


if __name__ == "__main__":
    main()
