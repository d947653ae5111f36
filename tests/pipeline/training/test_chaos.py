"""A run that is killed again and again, at any moment, ends with the weights of one that nothing disturbed.

Every start is the same command, some of them on the real launcher. ``KILLS=100 pytest -k killed_again`` kills more
often than CI does, here and in data preparation; ``KILL_SEED`` chooses other moments (see `tests.kills`).
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import Checkpoint, checkpoint_folders, step_of, unfinished_folders
from pipeline.training.run.folder import lock_of
from tests.kills import SEED, TRAINING_KILLS
from tests.launch import ROOT, Job, Launcher, kill, kill_one, start
from tests.pipeline.training.runs import curve, flags, metrics, same_bits, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
RANKS, STEPS = 2, 2 * TRAINING_KILLS
WORDS = [
    "--train.steps", str(STEPS), "--train.global-batch-size", "4", "--checkpoint.every-steps", "1",
    "--checkpoint.keep-last", "3", "--parallel.micro-batches", "1",
]  # fmt: skip
MOMENTS = ("in a step", "in a save", "at the start", "while publishing", "in a save")
LAUNCHED = 4
"""Of so many starts one is by DeepSpeed's launcher, which takes longer than all the rest; every moment meets it."""
START_S: Mapping[Launcher, float] = {"srun": 2.0, "deepspeed": 12.0}
"""How long ranks take to their first step, about."""


def test_a_run_that_is_killed_again_and_again_is_as_if_undisturbed(small_demo: Path, tmp_path: Path) -> None:
    reference = tmp_path / "undisturbed"
    train(small_demo, reference, *WORDS, ranks=RANKS).check()
    chaos = Chaos(random.Random(SEED))
    left, rounds = TRAINING_KILLS, 0
    while left:  # a run that is done before all kill points are used up is compared, and another is begun
        run_dir = tmp_path / f"run-{rounds}"
        left -= chaos.torment(small_demo, run_dir, left)
        train(small_demo, run_dir, *WORDS, ranks=RANKS).check()
        assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
        assert curve(run_dir) == curve(reference)
        assert [line["samples"] for line in metrics(run_dir)] == [line["samples"] for line in metrics(reference)]
        assert same_bits(weights(run_dir), weights(reference))
        rounds += 1
    print(f"{TRAINING_KILLS} kills, seed {SEED}: {dict(sorted(chaos.met.items()))}")


@dataclass(frozen=True)
class Before:
    """What a run folder held before a start, to tell it from what this start makes."""

    metrics_file: int
    """Its inode: a start rewrites the file."""
    steps: int
    torn: frozenset[Path]

    @classmethod
    def of(cls, run_dir: Path) -> Before:
        folders = checkpoint_folders(run_dir)
        saved = step_of(folders[0]) if folders else 0
        return cls(_inode(run_dir), saved, frozenset(unfinished_folders(run_dir)))

    def steps_since(self, run_dir: Path) -> int:
        if _inode(run_dir) == self.metrics_file:
            return 0
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n") - self.steps

    def saves_since(self, run_dir: Path) -> set[Path]:
        return set(unfinished_folders(run_dir)) - self.torn


def _inode(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


@dataclass
class Chaos:
    """Kills starts of a run at moments drawn with a seed, and looks at what each leaves behind."""

    random: random.Random
    met: dict[str, int] = field(default_factory=dict)
    """How often each moment was met."""

    def torment(self, demo: Path, run_dir: Path, kills: int) -> int:
        """Start a run and kill it, up to ``kills`` times, or until it is done; return how often it was killed."""
        for done in range(kills):
            killed = sum(self.met.values())
            moment = MOMENTS[killed % len(MOMENTS)]
            launcher: Launcher = "srun" if killed % LAUNCHED else "deepspeed"
            before = Before.of(run_dir)
            job = start(RANKS, ROOT / "pipeline/train.py", *flags(demo, run_dir, *WORDS), launcher=launcher)
            try:
                if not self._wait_for(moment, run_dir, job, before, START_S[launcher]):
                    return done
                self._kill(job)
                output, _ = job.communicate(timeout=600)
            finally:
                kill(job)
            self.met[moment] = self.met.get(moment, 0) + 1
            self._look(run_dir, output, f"kill {sum(self.met.values())}, {moment}")
        return kills

    def _wait_for(self, moment: str, run_dir: Path, job: Job, before: Before, start_s: float) -> bool:
        """Wait for a moment in a start's life; False when the run ends before it."""
        if moment == "at the start":
            return _until(lambda: False, job, self.random.uniform(0.1, start_s)) is None
        steps = self.random.randint(1, 2)
        if not _until(lambda: before.steps_since(run_dir) >= steps, job):
            return False
        seen = {
            "in a step": lambda: True,
            "in a save": lambda: bool(before.saves_since(run_dir)),
            "while publishing": lambda: any((save / "manifest.json").exists() for save in before.saves_since(run_dir)),
        }[moment]
        if not _until(seen, job, poll_s=0.001):
            return False
        time.sleep(self.random.uniform(0, 0.2 if moment == "in a step" else 0.004))
        return job.poll() is None

    def _kill(self, job: Job) -> None:
        """Kill -9 one rank, whose peers the launcher ends, or everything at once."""
        victim = self.random.choice([None, *range(RANKS)])
        if victim is None or not kill_one(job, victim):
            kill(job)

    def _look(self, run_dir: Path, output: str, what: str) -> None:
        """Nothing half-written may have been taken, or be there to be taken."""
        assert "damaged" not in output, (what, output)
        for folder in checkpoint_folders(run_dir):
            assert Checkpoint(folder).faults() == [], what
        deadline = time.monotonic() + 60  # the last of its processes may be on its way out
        while lock_of(run_dir).is_held():
            assert time.monotonic() < deadline, f"{what}: the lock is not free"
            time.sleep(0.1)


def _until(reached: Callable[[], bool], job: Job, timeout_s: float = 1200.0, poll_s: float = 0.005) -> bool | None:
    """Wait until something is reached: True; until the job ends: False; None when time is up."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if reached():
            return True
        if job.poll() is not None:
            return False
        time.sleep(poll_s)
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.7 MB, which holds two checkpoints but not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2700k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one_end_a_run_in_words_and_it_goes_on(
    small_demo: Path, small_disk: Path, tmp_path: Path
) -> None:
    train(small_demo, tmp_path / "undisturbed").check()
    run_dir = small_disk / "run"
    full = train(small_demo, run_dir)
    assert full.code == 2 and "Traceback" not in full.output, full.output
    assert "cannot be written" in full.output and "No space left" in full.output
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert [Checkpoint(folder).faults() for folder in checkpoint_folders(run_dir)] == [[]] * 2
    assert not unfinished_folders(run_dir), "its room is given back"
    remount(small_disk, "ro")
    refused = train(small_demo, run_dir)
    assert refused.code == 2 and "Traceback" not in refused.output, refused.output
    assert "cannot be written (Read-only file system)" in refused.output
    remount(small_disk, "rw,size=20m")
    assert "(step 4/6)" in train(small_demo, run_dir).check().output
    assert curve(run_dir) == curve(tmp_path / "undisturbed")
    assert same_bits(weights(run_dir), weights(tmp_path / "undisturbed"))


def test_stops_in_pt_and_in_sft_change_nothing(small_demo: Path, tmp_path: Path) -> None:
    ends = []
    for name, stops in (("undisturbed", False), ("stopped", True)):
        pt, sft = tmp_path / name / "pt", tmp_path / name / "sft"
        stages = ((pt, [], {"recipe": "demo_pt", "packs": "pt"}), (sft, ["--init-from", str(pt)], {}))
        for run_dir, more, kind in stages:
            run_dir.mkdir(parents=True)
            for begun in range(1 + stops):
                if begun < stops:
                    (run_dir / "STOP").touch()
                train(small_demo, run_dir, *more, ranks=1, **kind).check()
        ends.append((curve(pt), curve(sft), weights(sft)))
    assert ends[0][:2] == ends[1][:2]
    assert same_bits(ends[0][2], ends[1][2])
