"""ZeRO inside pipeline stages on four processes of this machine, against DeepSpeed's own engines in the same run.

Run from the repository root: ``python -m benchmarks.pipeline [--quick] [--steps N] [--json OUT]``. One launch of the
real launcher trains one small causal decoder under every setting. The baseline is ZeRO-3 without a pipeline as the
stock engine runs it (forward, backward and step per micro-batch), with the same number of micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
COLUMNS = ("engine", "pp", "micro-batches", "ZeRO", "gathered", "reduced", "step ms", "tokens / s", "x baseline",
           "x CPU time", "gather x", "gathers", "reduce x", "sent KiB")  # fmt: skip


def launch(out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all cases in one job."""
    words = ["--steps", str(options.steps), *(["--quick"] if options.quick else [])]
    words += ["--micro-batches", *map(str, options.micro_batches)]
    return launch_worker("benchmarks.pipeline_worker", out, words, options.port)


def launch_worker(module: str, out: Path, words: list[str], port: int) -> list[dict[str, Any]]:
    """Run a worker on four ranks; return what it wrote to ``out``. Exit with its output if it fails."""
    program = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        sys.exit("the deepspeed launcher is not installed: make setup")
    command = [program, "--num_accelerators", str(RANKS), "--master_port", str(port), "--module", module, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ended.returncode:
        sys.exit(f"the job failed\n{ended.stdout[-4000:]}")
    results: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return results


def with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add tokens per second, and throughput and processor time per token relative to the baseline."""
    base = {case["microbatches"]: case for case in results if case["engine"] == "ZeRO-3"}

    def rate(case: dict[str, Any]) -> float:
        return float(case["tokens"] / case["seconds"])

    def work(case: dict[str, Any]) -> float:
        return float(case["cpu_seconds"] / case["tokens"])

    return [
        case
        | {
            "tokens_per_s": rate(case),
            "vs_baseline": rate(case) / rate(base[case["microbatches"]]),
            "cpu_vs_baseline": work(case) / work(base[case["microbatches"]]),
        }
        for case in results
    ]


def table_line(case: dict[str, Any]) -> str:
    """Return a result as a row of the Markdown table."""
    ours, counted = case["engine"] == "stages", case["engine"] != "PipelineModule"
    once = case["once"] if case["once"] is not None else case["zero"] != 2
    traffic = [f"{case['gather_x']:.2f}", f"{case['gathers']:.0f}", f"{case['reduce_x']:.2f}"]
    cells = [
        f"**{case['engine']}**" if ours else case["engine"],
        str(case["pp"]), str(case["microbatches"]), str(case["zero"]),
        f"{case['gathered_fraction']:g}" if ours and case["zero"] == 3 else "-",
        ("once" if once else "each") if ours else "-",
        f"{1000 * case['seconds']:,.0f}", f"{case['tokens_per_s']:,.0f}", f"{case['vs_baseline']:.2f}",
        f"{case['cpu_vs_baseline']:.2f}", *(traffic if counted else ["-"] * 3),
        f"{case['sent_bytes'] / 1024:,.0f}" if ours else "-",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 2 stages, fewer settings")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=None, metavar="N",
        help="micro-batches per step on each data-parallel rank (default: 4 8; with --quick 4)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="timed steps per case; the fastest counts (default: 4)")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write the results here")
    parser.add_argument("--port", type=int, default=29555, help="port of the job (default: 29555)")
    options = parser.parse_args(argv)
    options.micro_batches = options.micro_batches or ([4] if options.quick else [4, 8])
    return options


def main(argv: list[str] | None = None) -> None:
    """Run, print the table, and optionally write JSON."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = with_ratios(launch(Path(folder) / "results.json", options))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|'}{'---:|' * (len(COLUMNS) - 1)}")
    for case in results:
        print(table_line(case))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
