"""``python -m tests.fuzz [TARGET ...] --seconds 60 --seed N``: search, save finds into the corpus, exit 1 on a find."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

from tests.fuzz.engine import Find, search_and_report, target_names


def main() -> int:
    """Run the targets one after another, each in a process of its own, so that a crash is a find too."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of untrusted bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all ({', '.join(target_names())})")
    parser.add_argument("--seconds", type=float, default=60, help="per target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: %(default)s)")
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - set(target_names())):
        parser.error(f"unknown target {unknown[0]}: use {', '.join(target_names())}")
    finds = [_fuzz(name, options.seconds, options.seed) for name in options.targets or target_names()]
    return int(any(finds))


def _fuzz(name: str, seconds: float, seed: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder) / "input"
        process = multiprocessing.get_context("spawn").Process(
            target=search_and_report, args=(name, seconds, seed, last)
        )
        process.start()
        process.join()
        if process.exitcode not in (0, 1) and last.is_file():
            find = Find(last.read_bytes(), "")
            print(f"{name}: the process died ({process.exitcode}); input in {find.save(name)}", flush=True)
    return process.exitcode != 0


if __name__ == "__main__":
    sys.exit(main())
