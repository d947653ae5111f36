"""A stand-in for the trainer: it writes status.json, obeys STOP and sets an exit code, without a model.

Copied to ``pipeline/train.py`` of a test's working folder, so a start costs no more than Python.
``--play done | limit | user | struck | crash | silence`` is how a start goes, ``--gain N`` the steps it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = os.environ["SLURM_JOB_ID"]


def main() -> int:
    """Play this rank's part; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--init-from", default="")
    parser.add_argument("--play", default="done")
    parser.add_argument("--gain", type=int, default=1)
    flags, _ = parser.parse_known_args()
    if flags.play == "crash" and os.environ["SLURM_PROCID"] == "1":
        raise SystemExit("rank one is out of memory")
    if os.environ["SLURM_PROCID"] == "0" or flags.play == "crash":
        return play(flags.run_dir, flags.play, flags.gain, flags.init_from)
    return 0


def play(run: Path, part: str, gain: int, init_from: str) -> int:
    """Advance from the step of status.json as the part requires, and write how the start ended."""
    status = run / "status.json"
    step = int(json.loads(status.read_text())["step"]) if status.exists() else 0
    print(f"from step {step}, weights of {init_from or 'nothing'}", flush=True)
    if part == "crash":
        status.write_text(json.dumps({"state": "failed", "step": step, "error": "rank 1 is gone"}))
        time.sleep(60)  # srun ends this rank
    if part == "limit":  # what --signal does near the time limit
        subprocess.run(["scancel", "--batch", "--signal=USR1", JOB], check=True)
        while not (run / "STOP").exists():
            time.sleep(0.05)
    if part == "silence":  # a node whose daemon hangs, at first; it is there again for the second start
        part = "silence" if step == 0 else "done"
    state = {"done": "done", "struck": "running", "silence": "running"}.get(part, "stopped")
    status.write_text(json.dumps({"state": state, "step": step + gain}))
    if part == "struck":  # what Slurm does when it finds a node lost, or wants the nodes for another job
        subprocess.run(["scontrol", "requeue", JOB], check=True)
        time.sleep(60)
    if part == "silence":
        os.kill(int(Path(os.environ["SILENCED"]).read_text()), signal.SIGSTOP)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
