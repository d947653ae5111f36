"""Asks a run of a study, in a process of its own."""

from __future__ import annotations

import sys

from pipeline.study.measure import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
