"""Tests never meet a user's runs and data: `make demo && make test` and `make test && make demo` are both green."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, environment


@pytest.mark.parametrize("name", ["runs", "data"])
def test_the_checkouts_own_folders_cannot_be_used(name: str, working_folder: Path) -> None:
    assert Path.cwd() == working_folder and not (working_folder / name).exists()
    with pytest.raises(RuntimeError, match="belongs to the user"):
        (ROOT / name / "demo_sft/status.json").open()
    for call in (f"open({name + '/x'!r})", f"import os; os.listdir({name!r})", f"import os; os.mkdir({name + '/x'!r})"):
        done = subprocess.run(
            [sys.executable, "-c", call], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode and "belongs to the user" in done.stderr, (call, done.stderr)
