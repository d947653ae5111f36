"""A two-node Slurm for the tests of this folder, and a working folder that looks like the repository root."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.slurm import cluster
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def slurm(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster; its working folder has the job scripts and the small demo's data, and its runs."""
    if reason := cluster.missing():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("slurm")
    work = root / "work"
    shutil.copytree(ROOT / "slurm", work / "slurm", ignore=shutil.ignore_patterns("*.log"))
    for name in ("pipeline", "ds_configs"):
        (work / name).symlink_to(ROOT / name)
    shutil.copytree(small_demo, work / "data/demo")
    running = cluster.start(root / "cluster", work)
    try:
        yield running
    finally:
        running.stop()
