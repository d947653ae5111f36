"""Fixtures shared by all rooms: a small demo world made by the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guard import sitecustomize

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_GUARD = str(Path(sitecustomize.__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_GUARD, os.environ.get("PYTHONPATH"))))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep a file's tests in one process, because they share fixtures; all Slurm tests share one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::", 1)[0]

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working folder: what a recipe finds in ``runs/`` and ``data/`` by default must not be a user's."""
    folder, before = tmp_path_factory.mktemp("working_folder"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder of a few hundred scenes: raw corpora, tokenizer, image store, packs/{pt,sft,eval}."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "demo",
        str(out),
        "--scenes",
        "300",
        "--held-out",
        "12",
        "--workers",
        "2",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run inside a test's process sets the variables of ranks: the next test must not look launched."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
