"""Ranks as a step of srun starts them, forked from one process that has imported what they import: starts are cheap.

They are real processes with Slurm's variables, all ended when one fails; only the imports are shared. ``start`` asks
``python tests/warm.py FD`` for them, which lives as long as the process that asks; ``FD`` is a socket, where a request
comes in with the file of the job's output and the pipe of its exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

GRACE_S = 3.0
"""What the other ranks have to say for themselves once one has failed."""
LONGEST_REQUEST = 1 << 20


@dataclass(frozen=True)
class Request:
    """A job: the ranks of one script."""

    ranks: int
    port: int
    script: str
    words: list[str]
    cwd: str
    env: dict[str, str]
    largest_file: tuple[int, int]
    """RLIMIT_FSIZE."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Request:
        values = json.loads(data)
        return cls(**{**values, "largest_file": tuple(values["largest_file"])})


class Job:
    """A started job, as much like ``subprocess.Popen`` as tests need."""

    def __init__(self, pid: int, output: IO[bytes], report: int) -> None:
        self.pid = pid
        """Of the process that leads the ranks' session."""
        self.returncode: int | None = None
        self._output, self._report = output, report

    def poll(self) -> int | None:
        """Return the exit code of the job that has ended, else None."""
        return self._wait(0)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end and return all output. Raises subprocess.TimeoutExpired, with the output so far."""
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired("ranks", timeout or 0, self._said())
        return self._said().decode(errors="replace"), None

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = int(os.read(self._report, 16) or -signal.SIGKILL)  # who says nothing was killed
            os.close(self._report)
        return self.returncode

    def _said(self) -> bytes:
        self._output.seek(0)
        return self._output.read()


def start(request: Request) -> Job:
    """Start a job; the first one waits for the imports."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  # the job's, to its end
    report, theirs = os.pipe()
    requests = _requests(os.getpid())
    socket.send_fds(requests, [request.to_bytes()], [output.fileno(), theirs])
    os.close(theirs)
    leader = requests.recv(32)
    assert leader, "the process that forks ranks has died"
    return Job(int(leader), output, report)


@cache
def _requests(owner: int) -> socket.socket:
    """Return the socket of the process that forks, which ends with its owner."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def fork(work: Callable[[], int]) -> int:
    """Return the id of a new process that ends with the code of ``work``."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as the end of an interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lead(request: Request, output: int, report: int) -> int:
    """Start the ranks in a session of their own, and report their exit code."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    resource.setrlimit(resource.RLIMIT_FSIZE, request.largest_file)
    shared = {"SLURM_STEP_NUM_TASKS": str(request.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request.port)}
    ranks = [fork(partial(run, rank, request, shared, report)) for rank in range(request.ranks)]
    code = wait(ranks)
    os.write(report, str(code).encode())
    return code


def run(rank: int, request: Request, shared: Mapping[str, str], report: int) -> int:
    """Be one rank, named so in the list of processes."""
    os.close(report)
    Path("/proc/self/comm").write_text(f"rank {rank}")
    os.environ.update(shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    sys.argv = [request.script, *request.words]
    named = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [str(Path(request.script).parent), *named, *sys.path[1:]]
    try:
        runpy.run_path(request.script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def wait(ranks: list[int]) -> int:
    """Return the code of the first rank that fails, once the others have been ended too, or 0."""
    left, failed, deadline = set(ranks), 0, 0.0
    stops = [signal.SIGTERM, signal.SIGKILL]
    while left:
        for rank in list(left):
            found, status = os.waitpid(rank, os.WNOHANG)
            if not found:
                continue
            left.remove(rank)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code if code > 0 else 128 - code, time.monotonic() + GRACE_S
        if failed and stops and time.monotonic() > deadline:
            stop, deadline = stops.pop(0), time.monotonic() + GRACE_S
            for rank in left:
                os.kill(rank, stop)
        time.sleep(0.01)
    return failed


def preload() -> None:
    """Import what a rank of training imports, and nothing that starts a thread."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of this file has rooms of the same names
    from pipeline.parallel.launch import configure_libraries

    configure_libraries()
    import pipeline.planning.dry_run
    import pipeline.planning.run_plan
    import pipeline.training.demo_data
    import pipeline.training.supervise
    import pipeline.training.trainer  # noqa: F401

    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    lost = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # the allocator of pyarrow starts its own again
    assert not lost, f"threads {lost} would be lost in a fork"


def main() -> int:
    preload()
    gc.freeze()  # what is shared stays shared: collections in ranks leave it alone
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders report by their pipe
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            data, files, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 2)
            if not data:
                return 0  # whoever asked is gone
            request = Request.from_bytes(data)
            leader = fork(partial(lead, request, *files))
            for file in files:
                os.close(file)
            requests.send(str(leader).encode())


if __name__ == "__main__":
    sys.exit(main())
