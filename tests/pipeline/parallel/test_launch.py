"""What libraries are told before they are loaded."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.parallel.launch import configure_libraries, set_determinism
from pipeline.train import main


@pytest.mark.parametrize(("given", "loading"), [({}, "EAGER"), ({"CUDA_MODULE_LOADING": "LAZY"}, "LAZY")])
def test_kernels_are_loaded_at_the_start_unless_the_user_says_otherwise(
    given: dict[str, str], loading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    configure_libraries()
    assert os.environ["CUDA_MODULE_LOADING"] == loading
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_deterministic_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("rank", "world"),
    [("-1", "2"), ("x", "2"), ("", "2"), ("2", "2"), ("0", "0"), ("0", "99999999999"), ("1e0", "2"), ("\u00b2", "3")],
)
def test_a_rank_that_makes_no_sense_is_refused_in_one_line(
    rank: str, world: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: RANK={rank!r}, WORLD_SIZE={world!r}, ") and said.count("\n") == 1
