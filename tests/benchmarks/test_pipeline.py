"""The benchmarks of whole steps: ratios, tables, and the step itself with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline import COLUMNS, table_line, with_ratios
from tests.launch import ROOT, environment

COUNTED = {"gather_x": 1.0, "gathers": 3.0, "reduce_x": 1.0, "reductions": 1.0, "sent_bytes": 2048.0}


def case(engine: str, *, pp: int, seconds: float, cpu: float, zero: int = 3) -> dict[str, Any]:
    settings = {"engine": engine, "pp": pp, "microbatches": 4, "zero": zero, "gathered_fraction": 1.0, "once": None}
    return settings | COUNTED | {"seconds": seconds, "cpu_seconds": cpu, "tokens": 4096 // pp}


def test_ratios_are_to_stock_zero_3_with_as_many_micro_batches() -> None:
    results = [case("ZeRO-3", pp=1, seconds=2.0, cpu=4.0), case("stages", pp=2, seconds=0.5, cpu=3.0)]
    base, ours = with_ratios(results)
    assert (base["vs_baseline"], base["cpu_vs_baseline"]) == (1, 1)
    assert (ours["tokens_per_s"], ours["vs_baseline"], ours["cpu_vs_baseline"]) == (4096, 2, 1.5)
    for line in map(table_line, (base, ours)):
        assert line.count("|") == len(COLUMNS) + 1
    assert "| 2.00 | 1.50 | 1.00 | 3 | 1.00 | 2 |" in table_line(ours)


def test_zero_stages_say_when_they_reduce() -> None:
    results = [case("ZeRO-3", pp=1, seconds=1.0, cpu=1.0)]
    results += [case("stages", pp=1, seconds=1.0, cpu=1.0, zero=zero) for zero in (1, 2, 3)]
    cells = [[cell.strip() for cell in table_line(one).split("|")[4:7]] for one in with_ratios(results)]
    assert cells == [["3", "-", "-"], ["1", "-", "once"], ["2", "-", "each"], ["3", "1", "once"]]


@pytest.mark.slow
def test_a_packed_step_and_padded_batches_have_the_same_loss(tmp_path: Path) -> None:
    """The benchmark itself refuses to time them where their losses differ."""
    out = tmp_path / "out.json"
    words = ["-m", "benchmarks.step", "--tiny", "--tokens", "1100", "--repeats", "1", "--json", str(out)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (found,) = json.loads(out.read_text())
    assert found["samples"] == 4 and found["tokens"] <= 1100
    assert found["ratio"] == pytest.approx(found["packed_samples_per_s"] / found["padded_samples_per_s"])
