"""What keeps a machine from training: how much room a folder needs."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.parallel.health import MIN_FREE_GIB, MIN_FREE_TEMPORARY_GIB, disk_problem

Usage = namedtuple("Usage", "free")


def test_temporary_files_need_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, temporary = tmp_path / "run", tmp_path / "tmp"
    for folder in (run_dir, temporary):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for free, lack in ((2.0, []), (0.5, [run_dir]), (0.01, [run_dir, temporary])):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: Usage(free * 2**30))
        assert [folder for folder in (run_dir, temporary) if [*disk_problem(folder)]] == lack
    assert [*disk_problem(temporary, MIN_FREE_GIB)] and not [*disk_problem(temporary, 0)]
    assert MIN_FREE_TEMPORARY_GIB < MIN_FREE_GIB
