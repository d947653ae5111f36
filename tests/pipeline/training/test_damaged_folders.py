"""Run folders whose files are torn, deep, binary, links or pipes: one line, never a traceback, nothing followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.cli import main
from pipeline.training.metrics import MetricsFile, recent_losses
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.state import RunState

STATUS = {"state": "failed", "step": 4, "steps": 9, "error": "two\nlines", "start": 7}
DEEP = b'{"step": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BYTES = {
    "torn": b'{"state": "done", "st', "deep": DEEP, "binary": bytes(range(256)) * 40, "empty": b"", "list": b"[1, 2]",
    "types": b'{"state": 3, "step": "x", "steps": -1, "error": []}', "huge": b'{"step": ' + b"9" * 5_000 + b"}",
    "surrogate": b'{"state": "\\ud800", "step": 1e999}',
}  # fmt: skip


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


ODD: list[object] = [*(pytest.param(value, id=name) for name, value in BYTES.items()), link, pipe, folder]


def put(path: Path, content: bytes | Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5, "tokens_per_s": 10.0}\n')
    (tmp_path / "events.jsonl").write_text('{"code": "step-skipped", "count": 2}\n')
    return tmp_path


def test_a_healthy_folder_is_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run_dir)]) == 0
    line = capsys.readouterr().out
    assert "failed" in line and "step 5/9  loss 1.5000  step-00000004" in line and line.count("\n") == 1
    assert "two lines" in line and "2 step-skipped" in line


@pytest.mark.parametrize("content", ODD)
@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "events.jsonl"])
def test_a_damaged_file_is_one_line(
    name: str, content: bytes | Callable[[Path], None], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run_dir / name, content)
    code = main(["status", str(run_dir)])
    said = capsys.readouterr()
    assert code in (0, 2) and (said.out + said.err).count("\n") == 1
    assert Path("/etc/hostname").read_text().strip() not in said.out
    if name != "status.json":
        assert code == 0 and "step-00000004" in said.out


@pytest.mark.parametrize("content", ODD)
def test_a_start_reads_on_or_refuses_the_folder(content: bytes | Callable[[Path], None], run_dir: Path) -> None:
    """A start keeps the lines it can read, and writes through no link and into no pipe."""
    put(run_dir / "metrics.jsonl", content)
    if not isinstance(content, bytes):
        if content is not folder:
            with pytest.raises(UserError, match=r"metrics.jsonl is (a symbolic link|not a regular file)"):
                RunFolder(str(run_dir)).create()
        return
    RunFolder(str(run_dir)).create()
    assert recent_losses(run_dir / "metrics.jsonl", 9, 64) == []
    file = MetricsFile(run_dir / "metrics.jsonl", resume_step=9)
    assert file.damaged >= bool(content)
    file.close()


def test_a_damaged_status_says_so(run_dir: Path) -> None:
    put(run_dir / "status.json", DEEP)
    with pytest.raises(UserError, match=r"status.json is damaged"):
        RunState.read(run_dir)
