"""Fixtures shared by all rooms: a small demo world made by the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
