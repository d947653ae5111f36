"""The real command killed in the middle of its work, against an undisturbed study."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.packs import PackReader
from pipeline.commands.study import status
from pipeline.study.folder import StudyFolder
from pipeline.study.page import write_report
from pipeline.study.runner import StudyRunner
from pipeline.study.spec import load_study
from tests.launch import ROOT, environment
from tests.launch import run as launch
from tests.pipeline.study.studies import write_study

COMPARED = ("results.json", "results.csv")


class WarmRunner(StudyRunner):
    """A runner whose processes are forked from one that has imported torch: the same code, cheaper starts."""

    def _call(self, name: str, module: str, words: Any) -> int:
        script, rest = ROOT / "pipeline/train.py", [*words]
        if module == "pipeline.study.measure":
            script = ROOT / "tests/pipeline/study/measure_worker.py"
        else:
            at = rest.index("--ranks")  # the last flag
            rest = [*rest[1:at], *rest[at + 2 :]]
        ended = launch(1, script, *rest, env={"PYTHONPATH": str(ROOT)}, launcher="srun")
        with self._open_log(name) as log:
            log.write(ended.output)
        return ended.code


def finish(path: Path) -> StudyFolder:
    folder = StudyFolder(load_study(str(path)))
    WarmRunner(folder, str(path), lambda line: None).run(1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    folder = finish(write_study(tmp_path_factory.mktemp("undisturbed"), small_demo))
    write_report(folder)
    return folder


@pytest.mark.slow
def test_a_study_killed_three_times_reports_the_same(
    undisturbed: StudyFolder, small_demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, small_demo)
    folder = StudyFolder(load_study(str(path)))
    first = folder.run_dir("final/causal-s3")
    for moment in (
        lambda: (first / "metrics.jsonl").exists(),  # in the middle of training
        lambda: (first / "export").exists(),  # while it answers
        lambda: folder.run_dir("final/mma-s3").joinpath("checkpoints").exists(),  # as the second run begins
    ):
        kill_when(moment, path)
    assert "1 of 4 runs done" in status(folder)[-1] and any("running" not in line for line in status(folder))
    finish(path)
    write_report(folder)
    for name in COMPARED:
        assert (folder.path / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


def kill_when(moment: Any, path: Path) -> None:
    """Start the real command, and kill -9 it, and only it, once ``moment`` is true."""
    command = [sys.executable, "-m", "pipeline.cli", "study", "run", str(path)]
    env = environment({"PYTHONPATH": str(ROOT)})
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()[-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_the_answers_are_those_of_the_test_rows(undisturbed: StudyFolder, small_demo: Path) -> None:
    packs = PackReader(small_demo / "packs/eval")
    validated = packs.rows_that_hold(12)
    expected = [source.sample for row in range(validated, len(packs)) for source in packs.sources(row)]
    run = undisturbed.runs()[0]
    found = undisturbed.answers(run)
    assert found is not None and found["flops"] > 1e6
    assert [answer["sample"] for answer in found["sets"]["plain"]] == expected
    assert [step for step, _ in undisturbed.curve(run)] == [3, 6]
    assert all(len(right) == len(expected) for right in found["guesses"].values())
    assert not (undisturbed.run_dir(run) / "export").exists()
