"""The record of a run's environment: versions, plug-ins, git state, and variables that affect results or speed.

Variables are listed by name or by a library's prefix, so no secret is among them.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.common.plugins import plugins_in_use
from pipeline.training.run.redact import is_secret_name, redact, redact_words

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "pyarrow", "numpy")
_PREFIXES = ("CUDA_", "NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "MKL_", "UCX_", "FI_", "PYTORCH_", "DS_")
_NAMES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
          "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT", "SLURM_STEP_NUM_TASKS",
          "SLURM_CLUSTER_NAME")  # fmt: skip
_LINES = 50


def environment(world: int) -> dict[str, Any]:
    """Return the content of env.json."""
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "plugins": plugins_in_use(),
        "git": git_state(),
        "host": socket.gethostname(),
        "ranks": world,
        "command": redact_words([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "variables": variables(),
    }


def versions() -> dict[str, str | None]:
    """Return the installed versions of `PACKAGES`."""
    return {name: _version(name) for name in PACKAGES}


def variables() -> dict[str, str]:
    """Return the environment variables that may be recorded."""
    named = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {name: redact(value) for name, value in sorted(named.items()) if not is_secret_name(name)}


def git_state() -> dict[str, Any] | None:
    """Return the commit and the files that differ from it; None if the code is not in git."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed inside another repository
        return None
    changed = (_git("diff", "HEAD", "--stat=100") or "").splitlines()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "changed": [line.strip() for line in changed][-_LINES:],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
