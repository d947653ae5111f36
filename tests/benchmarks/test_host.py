"""The benchmark of the trainer's own cost: its table, and a run of the demo both ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.host import COLUMNS, Clocks, table_line
from tests.launch import ROOT, environment


def test_processor_time_is_shared_out_between_the_loop_and_the_rows() -> None:
    clocks = Clocks(plain=2.0, main=2.2, process_began=10.0, process_ended=14.5, tokens=[100, 300])
    line = table_line("demo_pt", clocks)
    assert line == "| demo_pt | 200 | 1000.0 | 1250.0 | **1.25** | 1.10 | 0.15 |"
    assert line.count("|") == len(COLUMNS) + 1


@pytest.mark.slow
def test_trainer_and_plain_loop_reach_the_same_losses(small_demo: Path, tmp_path: Path) -> None:
    """The benchmark itself refuses to print a ratio where they differ."""
    words = ["-m", "benchmarks.host", "--recipes", "demo_sft", "--demo", str(small_demo), "--steps", "2"]
    env = environment({"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)})
    ended = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1].startswith("| demo_sft | ")
