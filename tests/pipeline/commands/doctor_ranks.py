"""``mma doctor`` on several ranks, where rank 1 has a run folder that cannot be written: FOLDER FLAGS."""

from __future__ import annotations

import os
import sys

from pipeline.cli import main
from pipeline.parallel.launch import fill_rank_variables

if __name__ == "__main__":
    fill_rank_variables()
    folder = sys.argv[1] if os.environ["RANK"] == "0" else "/proc/self"
    sys.exit(main(["doctor", "--run-dir", folder, *sys.argv[2:]]))
