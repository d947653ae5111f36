"""Cost of the prober: five faults and their fixed forms, stock models under MMA, and this project's own model.

Run from the repository root: ``python -m benchmarks.prober``. Processor time on one CPU thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pipeline.hf import AssistantSpans, enable_mma
from pipeline.masks import POLICIES, get_policy
from pipeline.prober import probe
from pipeline.prober.own import StageSubject
from pipeline.prober.subject import Subject
from tests.pipeline.hf.models import CLASSES, IMAGE_ID, Rows, tiny
from tests.pipeline.prober import faults
from tests.pipeline.prober.test_probe import GRID, own_batch, own_stage
from tests.pipeline.prober.test_probe import IMAGE_ID as OWN_IMAGE_ID

Case = tuple[str, Callable[..., Any], list[Mapping[str, Any]]]
HEADER, END = 33, 34


def cases() -> Iterator[Case]:
    """Yield (name, model, batches)."""
    for name in faults.FAULTS:
        make, batches = getattr(faults, name), getattr(faults, f"{name}_batches")
        yield f"{name}", make(), batches()
        yield f"{name}, fixed", make(fixed=True), batches(fixed=True)
    for name in CLASSES:
        yield f"{name} with enable_mma", *stock(name)
    for name, policy in POLICIES.items():
        if not policy.leaks:
            model = StageSubject(own_stage(), get_policy(name, grid=GRID), OWN_IMAGE_ID)
            yield f"own model, {name}", model, [own_batch()]


def stock(name: str) -> tuple[Callable[..., Any], list[Mapping[str, Any]]]:
    """Return a tiny stock model under MMA, and a packed row of a chat and a question."""
    model, rows = tiny(name), Rows.of(name, "Q2 V4 Q3 A3 Q2 A2 | V4 Q2 A3")
    enable_mma(model, assistant_spans=AssistantSpans(start=(HEADER,), end=(END,)))
    ids = rows.with_spans(HEADER, END)
    batch = {**rows.inputs(model), "input_ids": ids, "labels": torch.where(rows.generated, ids, -100)}
    if name.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == IMAGE_ID).long()
    return model, [batch]


def main() -> None:
    """Print the table; the last column is the probe's time over that of one forward pass of the same batch."""
    torch.set_num_threads(1)
    print("| case | result | probe s | x forward |\n|---|---|---:|---:|")
    for name, model, batches in cases():
        probe(model, batches)  # the first run pays for imports and caches
        forward = min(_seconds(lambda: _forward(model, batches)) for _ in range(5))  # noqa: B023
        start = time.process_time()
        report = probe(model, batches)
        seconds = time.process_time() - start
        result = "clean" if report.ok else report.findings[0].check
        print(f"| {name} | {result} | {seconds:.2f} | {seconds / forward:.0f} |", flush=True)


def _forward(model: Callable[..., Any], batches: list[Mapping[str, Any]]) -> None:
    with torch.no_grad():
        for batch in batches:
            Subject(model).call(batch)


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
