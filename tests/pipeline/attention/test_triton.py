"""The Triton kernel on the CPU: forward and backward of the gather in Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.launch import ROOT, environment


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (torch for CUDA brings it)")
def test_the_gather_sum_kernel_equals_float64_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when the kernel is defined."""
    command = [sys.executable, "-m", "tests.pipeline.attention.triton_worker"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment({"PYTHONPATH": str(ROOT)}), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
