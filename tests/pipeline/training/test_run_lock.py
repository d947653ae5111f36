"""Who holds a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.training.run import lock
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.lock import hold, holder, is_running
from tests.launch import ROOT

HOLD = """
import pathlib, sys
from pipeline.training.run.lock import hold
lock = hold(pathlib.Path(sys.argv[1]))
print(1, flush=True)
input()
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_a_second_start_is_refused_and_a_killed_one_leaves_nothing(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HERE_S", 0.3)
    assert is_running(tmp_path) is True
    words = rf"is being trained by process {other.pid} on {socket.gethostname()}: .*--run-dir"
    with pytest.raises(UserError, match=words):
        hold(tmp_path)
    assert holder(tmp_path)["pid"] == other.pid, "the one who is refused leaves the holder's name"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert is_running(tmp_path) is False
    with hold(tmp_path):
        assert is_running(tmp_path) is True
        assert holder(tmp_path)["pid"] == os.getpid()
    assert is_running(tmp_path) is False


def test_a_holder_that_is_about_to_die_is_waited_for(other: subprocess.Popen[str], tmp_path: Path) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    with hold(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    other.wait()


def test_a_folder_that_was_never_trained_is_not_running(tmp_path: Path) -> None:
    assert is_running(tmp_path / "nowhere") is False
    assert holder(tmp_path) == {}


def test_without_locks_a_start_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    hold(tmp_path).close()
    assert "cannot be locked (No locks available): start this run only once" in capsys.readouterr().out
    assert is_running(tmp_path) is None


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "status.json"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        RunFolder(str(tmp_path / "run")).create()
    if name == "lock":
        with pytest.raises(UserError, match="lock cannot be opened"):
            hold(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()
