"""Checks names of benchmarks: exit code 2 and one line if one is unknown. check_bench.py NAME[,NAME]|all."""

from __future__ import annotations

import sys

from data_prep.common.errors import UserError
from pipeline.evaluation.registry import chosen


def main() -> int:
    """Look the names up as mma bench does; return the exit code."""
    try:
        chosen(sys.argv[1])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
