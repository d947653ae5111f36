"""What libraries are told before they are loaded."""

from __future__ import annotations

import os

import pytest

from pipeline.parallel.launch import configure_libraries


@pytest.mark.parametrize(("given", "loading"), [({}, "EAGER"), ({"CUDA_MODULE_LOADING": "LAZY"}, "LAZY")])
def test_kernels_are_loaded_at_the_start_unless_the_user_says_otherwise(
    given: dict[str, str], loading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    configure_libraries()
    assert os.environ["CUDA_MODULE_LOADING"] == loading
