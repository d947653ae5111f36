"""Ranks are taken from whichever launcher started the process."""

from __future__ import annotations

import os

import pytest

from pipeline.parallel.groups import fill_rank_variables


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        pytest.param({}, ("0", "1", "0"), id="alone"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("3", "4", "1"), id="deepspeed"),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, ("5", "8", "1"), id="srun"
        ),
        pytest.param({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ("0", "1", "0"), id="a batch script without srun"),
        pytest.param(
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("1", "2", "1"),
            id="Open MPI",
        ),
        pytest.param({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}, ("1", "2", "0"), id="MPICH"),
    ],
)
def test_rank_variables(given: dict[str, str], ranks: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    fill_rank_variables()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ranks
    assert os.environ["MASTER_PORT"].isdigit()
