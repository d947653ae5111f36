"""The schedule simulator against measured steps: four processes, real messages, injected latencies.

Run from the repository root: ``python -m benchmarks.simulator``. Layers sleep besides computing, unequally on the
stages, and messages arrive late, so a busy machine disturbs little and latencies are those of a slow network. The first
case injects nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline import launch_worker

COLUMNS = ("stages", "schedule", "micro-batches", "sleep of a forward s", "message s", "measured s", "predicted s",
           "predicted / measured", "predicted ahead s")  # fmt: skip


def table_line(case: dict[str, Any]) -> str:
    """Return a result as a row of the Markdown table."""
    virtual = f", {case['virtual_stages']} virtual" if case["virtual_stages"] > 1 else ""
    cells = [
        f"{case['pp']}{virtual}", case["schedule"], str(case["microbatches"]),
        " ".join(f"{seconds:g}" for seconds in case["stage_s"][: case["pp"]]), f"{case['message_s']:g}",
        f"{case['measured_s']:.2f}", f"{case['predicted_s']:.2f}",
        f"**{case['predicted_s'] / case['measured_s']:.2f}**", f"{case['ahead_s']:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--port", type=int, default=29556, help="port of the job (default: 29556)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = launch_worker("benchmarks.simulator_worker", Path(folder) / "results.json", [], options.port)
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}")
    for case in results:
        print(table_line(case))


if __name__ == "__main__":
    main()
