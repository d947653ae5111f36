"""Makes the runs of a study: any number of processes, on any number of nodes, share them by locks.

Each worker takes the first run that is ready and that nobody else makes. A killed process leaves a lock that the kernel
has released and a run folder from which the trainer resumes, so the same command continues.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from data_prep.common.errors import UserError
from data_prep.common.folder_lock import FolderLock
from pipeline.study.folder import StudyFolder
from pipeline.study.graph import Run
from pipeline.training.run.folder import lock_of

POLL_S = 2.0
"""Seconds between two looks at runs that other processes make."""
_CHILD = """\
import importlib, os, sys
from data_prep.common.processes import end_with_parent
end_with_parent(int(sys.argv[1]))
sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
"""


class StudyRunner:
    """Makes what is missing of a study."""

    def __init__(self, folder: StudyFolder, name: str, say: Callable[[str], None], *, only: Sequence[str] = ()) -> None:
        """Make runs of ``folder``.

        Args:
            folder: the study's.
            name: name or file of the study, for the processes that ask the models.
            say: gets a line for each event.
            only: arms to make, with the stages they need; none = all.
        """
        self._folder, self._name, self._say, self._only = folder, name, say, frozenset(only)
        self._stopped = threading.Event()
        self._failed: dict[str, str] = {}
        self._mine: set[str] = set()
        self._guard = threading.Lock()

    def prepare(self) -> None:
        """Make the data that is missing. Raises UserError if a command fails."""
        for step in self._folder.study.prepare:
            with self._data_lock().hold(self._say, wait=True):
                if Path(step.makes).exists():
                    continue
                words = shlex.split(step.run)
                if words[:1] != ["mma-prep"]:
                    raise UserError(f"prepare: '{step.run}' is not a command of mma-prep")
                self._say(f"$ {step.run}")
                code = self._call("prepare", "data_prep.cli", words[1:])
                if code or not Path(step.makes).exists():
                    log = self._log("prepare")
                    raise UserError(f"'{step.run}' failed or did not make {step.makes}: {_last_error(log)}; see {log}")

    def run(self, workers: int) -> None:
        """Make all runs, ``workers`` at a time. Raises UserError naming the runs that failed.

        A run that was made with other settings than the study's is refused. Ctrl-C reaches the children too: they end
        and no other run starts.
        """
        self._check()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="study")
        try:
            for future in [pool.submit(self._work) for _ in range(workers)]:
                future.result()
        except BaseException:
            self._stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        self._check()  # now the rates are known, and with them all runs
        if self._failed:
            listing = "; ".join(f"{name}: {why}" for name, why in sorted(self._failed.items()))
            raise UserError(f"{len(self._failed)} runs failed ({listing}): fix that and run the same command again")

    def _check(self) -> None:
        for run in self._folder.runs():
            self._folder.check(run)

    def _work(self) -> None:
        while not self._stopped.is_set():
            missing = [run for run in self._folder.runs(self._only) if not self._folder.is_done(run)]
            open_ones = [run for run in missing if not self._is_blocked(run, missing)]
            if not open_ones:
                return
            if not any(self._take(run) for run in open_ones if self._is_ready(run)):
                self._stopped.wait(POLL_S)

    def _is_ready(self, run: Run) -> bool:
        return not run.after or self._folder.is_trained(run.after)

    def _is_blocked(self, run: Run, missing: Sequence[Run]) -> bool:
        """Whether a run has failed here, or one that it needs."""
        before = next((other for other in missing if other.name == run.after), None)
        return run.name in self._failed or (before is not None and self._is_blocked(before, missing))

    def _take(self, run: Run) -> bool:
        """Make a run unless another process or thread does; return whether it was made, or has failed."""
        with self._guard:
            if run.name in self._mine:
                return False
            self._mine.add(run.name)
        try:
            lock = self._folder.lock(run)
            if lock.is_held():
                return False
            with lock.hold(self._say):
                if not self._folder.is_done(run):
                    self._make(run)
        except UserError as error:
            if self._stopped.is_set() or self._folder.lock(run).is_held():  # another process was faster
                return False
            self._failed[run.name] = str(error)
            self._say(f"{run.name} failed: {error}")
        finally:
            with self._guard:
                self._mine.discard(run.name)
        return True

    def _make(self, run: Run) -> None:
        command = self._folder.command(run)
        self._folder.check(run)
        self._folder.define(run, command)
        self._wait_for_orphans(run)
        if not self._folder.is_trained(run):
            code = self._start(run, "training", "pipeline.cli", ["train", *command])
            if run.kind == "tuning" and self._folder.has_diverged(run):
                self._say(f"{run.name}: diverged, so its rate is the worst")
                return
            self._succeeded(run, code)
            if not self._folder.is_trained(run):
                raise UserError("the run was stopped before its last step")
        if run.kind == "final":
            words = [self._name, run.name]
            self._succeeded(run, self._start(run, "answering", "pipeline.study.measure", words))

    def _wait_for_orphans(self, run: Run) -> None:
        """Wait for ranks of a killed launcher: they train on to the end, and hold the lock of the run folder."""
        lock = lock_of(self._folder.run_dir(run))
        if lock.is_held():
            self._say(f"{run.name}: waiting for ranks that a killed study has left")
        while lock.is_held() and not self._stopped.wait(POLL_S):
            pass

    def _start(self, run: Run, what: str, module: str, words: Sequence[str]) -> int:
        if self._stopped.is_set():
            raise UserError("the study was stopped")
        self._say(f"{run.name}: {what}")
        return self._call(_log_name(run), module, words)

    def _succeeded(self, run: Run, code: int) -> None:
        """Raise UserError with the last error of a run's log unless its process ended with code 0."""
        if code:
            log = self._log(_log_name(run))
            raise UserError(f"{_last_error(log)} (see {log})")

    def _call(self, name: str, module: str, words: Sequence[str]) -> int:
        """Run a module's ``main`` in a process that ends with this one; return its exit code."""
        kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment = {**kept, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with self._open_log(name) as log:
            print("$", module, shlex.join(words), file=log, flush=True)
            command = [sys.executable, "-c", _CHILD, str(os.getpid()), module, *words]
            return subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode

    def _log(self, name: str) -> Path:
        return self._folder.path / "logs" / f"{name}.log"

    def _open_log(self, name: str) -> IO[str]:
        path = self._log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")

    def _data_lock(self) -> FolderLock:
        return FolderLock(self._folder.path / "locks" / "data", busy="{folder} is used by {holder}", once="start once")


def _log_name(run: Run) -> str:
    return run.name.replace("/", ".")


def _last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, else its last line."""
    lines: list[str] = []
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-200:] if line.strip()]
    errors = [line for line in lines if "error:" in line.lower() or "Error:" in line]
    return (errors or lines or ["no output"])[-1]
