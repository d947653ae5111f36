"""The benchmark of the demo's robustness: its table and its comparison, and that finished runs are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import FAMILIES, Trial, difference, lines


def trials(out: Path) -> list[Trial]:
    return [Trial(out, seed, "avx2", 2, out / "packs") for seed in (0, 1, 2)]


def finish(trial: Trial, policy: str, right: list[bool], seconds: float) -> None:
    accuracy = sum(right) / len(right)
    found = {
        "scores": {name: {"accuracy": accuracy} for name in (*FAMILIES, "all")},
        "answers": [{"right": one} for one in right],
        "seconds": seconds,
    }
    trial.folder.mkdir(parents=True, exist_ok=True)
    trial.made(policy).write_text(json.dumps(found))


def test_the_table_shows_what_is_finished_and_its_extremes(tmp_path: Path) -> None:
    first, second, _ = trials(tmp_path)
    finish(first, "mma", [True, True, True, False], 60)
    finish(second, "mma", [True, True, True, True], 90)
    assert list(lines(trials(tmp_path), "mma"))[2:] == [
        "| 0 | avx2 | 75.0 | 75.0 | 75.0 | 75.0 | 1.0 |",
        "| 1 | avx2 | 100.0 | 100.0 | 100.0 | 100.0 | 1.5 |",
        "|  | lowest | 75.0 | 75.0 | 75.0 | 75.0 | 1.0 |",
        "|  | highest | 100.0 | 100.0 | 100.0 | 100.0 | 1.5 |",
    ]


def test_policies_are_compared_by_run_and_question(tmp_path: Path) -> None:
    for trial in trials(tmp_path)[:2]:
        finish(trial, "mma", [True, True, True, False], 60)
        finish(trial, "causal", [True, False, True, False], 60)
    assert difference(trials(tmp_path), "causal").startswith("mma - causal: +25.0 points, 95 % interval ")


def test_a_finished_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trials(tmp_path)[0]
    finish(trial, "mma", [True], 60)
    monkeypatch.setattr("benchmarks.demo.run", None)
    trial.measure("mma")
