"""Folder locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep.common import folder_lock
from data_prep.common.errors import UserError
from data_prep.common.folder_lock import FolderLock
from tests.launch import ROOT

HOLD = """
import pathlib, sys
from data_prep.common.folder_lock import FolderLock
held = FolderLock(pathlib.Path(sys.argv[1]), "", "").hold(print)
print(1, flush=True)
input()
"""


@pytest.fixture
def lock(tmp_path: Path) -> FolderLock:
    return FolderLock(tmp_path / "lock", busy="{folder} is kept by {holder}: go away", once="start this only once")


@pytest.fixture
def other(lock: FolderLock) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock.path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_a_second_holder_is_refused_and_a_killed_one_leaves_no_lock(
    other: subprocess.Popen[str], lock: FolderLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "HERE_S", 0.3)
    assert lock.is_held() is True
    words = f"{lock.path.parent} is kept by process {other.pid} on {socket.gethostname()}: go away"
    with pytest.raises(UserError, match=words):
        lock.hold(print)
    assert lock.holder()["pid"] == other.pid, "a refused process keeps the holder's name"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert lock.is_held() is False
    with lock.hold(print):
        assert lock.is_held() is True
        assert lock.holder()["pid"] == os.getpid()
    assert lock.is_held() is False


def test_a_dying_holder_is_waited_for(other: subprocess.Popen[str], lock: FolderLock) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    with lock.hold(print):
        assert lock.holder()["pid"] == os.getpid()
    other.wait()


def test_the_lock_of_a_dead_node_is_waited_for_until_its_lease_ends(
    lock: FolderLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "HERE_S", 0.0)
    monkeypatch.setattr(folder_lock, "ELSEWHERE_S", 1.0)
    said = list[str]()
    with lock.hold(print) as held:
        lock.path.write_text(json.dumps({"host": "node7", "pid": 12}))
        with pytest.raises(UserError, match="is kept by process 12 on node7"):
            lock.hold(said.append)
        threading.Timer(0.3, held.close).start()
        lock.hold(said.append).close()
    assert said == 2 * [f"{lock.path.parent} is locked by process 12 on node7: waiting up to 1 s"]


def test_with_wait_the_lock_is_acquired_however_long_it_takes(
    other: subprocess.Popen[str], lock: FolderLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "HERE_S", 0.0)
    said = list[str]()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    with lock.hold(said.append, wait=True):
        assert len(said) == 1 and said[0].endswith(": waiting")
    other.wait()


def test_shared_holders_hold_it_together(lock: FolderLock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "HERE_S", 0.0)
    with lock.hold(print, shared=True), lock.hold(print, shared=True), pytest.raises(UserError, match="go away"):
        lock.hold(print)


def test_a_missing_folder_is_not_locked(tmp_path: Path) -> None:
    nowhere = FolderLock(tmp_path / "nowhere" / "lock", "", "")
    assert nowhere.is_held() is False
    assert nowhere.holder() == {}


def test_without_file_locks_work_continues_with_a_warning(lock: FolderLock, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    said = list[str]()
    lock.hold(said.append).close()
    assert said == [f"warning: {lock.path} cannot be locked (No locks available): start this only once"]
    assert lock.is_held() is None


def test_nothing_is_written_through_a_link(lock: FolderLock, tmp_path: Path) -> None:
    lock.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lock cannot be opened"):
        lock.hold(print)
    assert not (tmp_path / "elsewhere").exists()
