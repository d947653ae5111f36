"""Teams of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.processes import _wait_for_end
from data_prep.common.workers import MpiTeam, parse_share
from tests.launch import ROOT

_SCRIPT = """\
import signal, sys
from data_prep.common.workers import LocalTeam
from tests.data_prep.common.test_workers import begin_and_wait

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup ignores this one
    try:
        LocalTeam(2).map(begin_and_wait, sys.argv[1:], print)
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


def begin_and_wait(path: str) -> None:
    """A unit that is at work when Ctrl-C comes."""
    Path(path).touch()
    time.sleep(600)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_at_once_and_without_a_word(tmp_path: Path) -> None:
    begun = [tmp_path / name for name in "ab"]
    command = [sys.executable, "-c", _SCRIPT, *map(str, begun), str(tmp_path / "waiting")]
    team = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not all(path.exists() for path in begun):
            assert team.poll() is None
            time.sleep(0.05)
        os.killpg(team.pid, signal.SIGINT)
        _, words = team.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(team.pid, signal.SIGKILL)
    assert (team.returncode, words) == (1, "stopped\n") and not (tmp_path / "waiting").exists()


_PIPE_ONLY = """\
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tests.data_prep.common.test_workers import begin_and_wait, watch_pipe

if __name__ == "__main__":
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with ProcessPoolExecutor(2, context, watch_pipe, (watched,)) as pool:
        list(pool.map(begin_and_wait, sys.argv[1:]))
"""


_DEMO = """\
import sys
from pathlib import Path
from data_prep.demo.packs import Demo, ensure_demo

if __name__ == "__main__":
    ensure_demo(Path(sys.argv[1]).parent, Demo(scenes=50_000), quiet=True)
"""


def watch_pipe(watched: Connection) -> None:
    """Initializer of a worker that has no parent-death signal."""
    threading.Thread(target=_wait_for_end, args=(watched,), daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"),
    [
        pytest.param(_SCRIPT, signal.SIGTERM, id="terminated"),
        pytest.param(_SCRIPT, signal.SIGHUP, id="hung-up"),
        pytest.param(_SCRIPT, signal.SIGKILL, id="killed"),
        pytest.param(_PIPE_ONLY, signal.SIGKILL, id="killed-without-parent-death-signal"),
    ],
)
def test_no_worker_outlives_its_parent(script: str, number: signal.Signals, tmp_path: Path) -> None:
    begun = [tmp_path / name for name in "ab"]
    command = [sys.executable, "-c", script, *map(str, begun)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not all(path.exists() for path in begun):
            assert parent.poll() is None
            time.sleep(0.05)
        assert len(members(parent.pid)) >= 3, "the parent and two workers"
        parent.send_signal(number)
        assert parent.wait(60) == -number
        deadline = time.monotonic() + 30
        while left := members(parent.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_preparation_of_the_demo_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _DEMO, str(tmp_path / "x")], cwd=ROOT, start_new_session=True)
    try:
        while not (tmp_path / ".raw.partial").exists():
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
        parent.wait(60)
        deadline = time.monotonic() + 30
        while left := members(parent.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def members(session: int) -> list[str]:
    """Names of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, fields = stat.read_text().rsplit(")", 1)
            if int(fields.split()[3]) == session and fields.split()[0] != "Z":
                found.append(name)
    return found


@pytest.mark.parametrize("share", ["0", "1/1", "-1/2", "0/\u00b2", "a/b", "0/0"])
def test_malformed_shares_are_refused(share: str) -> None:
    assert parse_share("1/2") == (1, 2)
    with pytest.raises(UserError, match="give i/n"):
        parse_share(share)


class _OneRank:
    """An MPI communicator of one rank."""

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1

    def allgather(self, value: str) -> list[str]:
        return [value]

    def bcast(self, value: object, root: int) -> object:
        return value


@pytest.mark.parametrize("by_all", [False, True])
def test_mpi_ranks_report_an_unwritable_folder_like_any_user_error(tmp_path: Path, by_all: bool) -> None:
    team, file = MpiTeam(_OneRank()), tmp_path / "file"
    file.touch()

    def make(_: object = None) -> None:
        (file / "out").mkdir()

    with pytest.raises(UserError, match="Not a directory"):  # and no Abort, which _OneRank does not have
        team.map(make, [1], print) if by_all else team.serial(make)
