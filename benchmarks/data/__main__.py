"""Benchmarks of data preparation. Run from the repository root; every command names its baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.data import files, memory, planning, speed


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, module in (("plan", planning), ("memory", memory), ("speed", speed), ("files", files)):
        command = commands.add_parser(name, help=(module.__doc__ or "").partition(": ")[2], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    for line in options.run(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
