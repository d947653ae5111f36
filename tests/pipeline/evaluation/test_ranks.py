"""Real processes: two ranks share the questions of a benchmark, one is killed, and the result is that of one run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.launch import ROOT, environment

FLAGS = ["--device", "cpu", "--max-new-tokens", "2", "--batch", "1"]


def start(rank: int, words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "bench", "pope", *words],
        cwd=ROOT,
        env=environment({"RANK": str(rank), "WORLD_SIZE": "2"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_rank_killed_and_started_again_changes_nothing(
    exports: tuple[Path, Path], official: Path, tmp_path: Path
) -> None:
    common = ["--model", str(exports[0]), "--data", str(official), *FLAGS]
    words = [*common, "--out", str(tmp_path / "ranks")]
    folder = tmp_path / "ranks" / exports[0].name / "pope"
    ranks = [start(rank, words) for rank in (0, 1)]
    own = folder / "answers-00001-of-00002.jsonl"
    while not (own.is_file() and own.read_bytes().count(b"\n") >= 2) and ranks[1].poll() is None:
        time.sleep(0.005)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate(timeout=60)
    _, said = ranks[0].communicate(timeout=300)
    assert ranks[0].returncode == 0, said
    rest = start(1, words)
    printed, said = rest.communicate(timeout=300)
    assert rest.returncode == 0 and "pope" in printed, said
    assert main(["bench", "pope", *common, "--out", str(tmp_path / "one")]) == 0
    for name in ("graded.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (tmp_path / "one" / exports[0].name / "pope" / name).read_bytes()
