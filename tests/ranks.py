"""Starts the ranks of a script as a step of srun does: processes with Slurm's variables, all ended when one fails.

    python tests/ranks.py RANKS PORT SCRIPT ARGS...

Seconds cheaper than DeepSpeed's launcher, which imports torch twice before the first rank starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

GRACE_S = 3.0
"""What the other ranks have to say for themselves once one has failed."""


def start(ranks: int, port: str, command: list[str]) -> list[subprocess.Popen[bytes]]:
    slurm = {"SLURM_STEP_NUM_TASKS": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-u", *command],
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(ranks)
    ]


def wait(jobs: list[subprocess.Popen[bytes]]) -> int:
    """Return the code of the first rank that fails, or 0 when all have ended well."""
    left = list(jobs)
    while left:
        for job in left:
            code = job.poll()
            if code:
                return code if code > 0 else 128 - code
        left = [job for job in left if job.returncode is None]
        time.sleep(0.02)
    return 0


def end(jobs: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_S
    for stop in (lambda job: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for job in jobs:
            if job.poll() is None:
                stop(job)
        while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.02)
        deadline = time.monotonic() + GRACE_S


def main() -> int:
    ranks, port, *command = sys.argv[1:]
    jobs = start(int(ranks), port, command)
    code = wait(jobs)
    if code:
        end(jobs)
    return code


if __name__ == "__main__":
    sys.exit(main())
