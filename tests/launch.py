"""Starts jobs of several gloo processes from tests, by the real DeepSpeed launcher or as srun does; always ended."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
Launcher = Literal["deepspeed", "srun"]
Job = subprocess.Popen[str] | warm.Job


@dataclass(frozen=True)
class Finished:
    """A launched job that has ended."""

    code: int
    output: str

    def check(self) -> Finished:
        assert self.code == 0, f"exit code {self.code}\n{self.output[-6000:]}"
        return self


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a launched job: one thread a rank, the venv's programs first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {
        **kept,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        **(extra or {}),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    ranks: int,
    script: Path | str,
    *args: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    launcher: Launcher = "deepspeed",
) -> Job:
    """Start ``deepspeed --num_accelerators RANKS SCRIPT ARGS``, or ranks as srun does, in their own process session."""
    if launcher == "srun":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        return warm.start(warm.Request(ranks, free_port(), str(script), list(args), str(cwd), environment(env), limit))
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), str(script), *args]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(env), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def kill(job: Job, sig: int = signal.SIGKILL) -> None:
    """Signal every process of a job's session."""
    for process in session_processes(job.pid):
        try:
            os.kill(process, sig)
        except ProcessLookupError:
            continue


def kill_one(job: Job, rank: int) -> bool:
    """Kill -9 one rank of a job; False when it has no such process (yet)."""
    for process in session_processes(job.pid):
        try:
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            if f"--local_rank={rank}" in words or Path(f"/proc/{process}/comm").read_text() == f"rank {rank}\n":
                os.kill(process, signal.SIGKILL)
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def session_processes(session: int) -> Sequence[int]:
    """Process ids that belong to a session (the launcher and all ranks)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def run(
    ranks: int,
    script: Path | str,
    *args: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
    launcher: Launcher = "deepspeed",
) -> Finished:
    """Run a job to its end; whatever is left of it after ``timeout_s`` is killed and the test fails."""
    job = start(ranks, script, *args, cwd=cwd, env=env, launcher=launcher)
    try:
        output, _ = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the job did not end in {timeout_s} s\n{(error.output or b'')[-3000:]!r}") from error
    finally:
        kill(job)
    assert job.returncode is not None
    return Finished(job.returncode, output)
