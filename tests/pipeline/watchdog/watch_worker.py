"""One rank that only has a watchdog; the ranks do as their variable FAULT says once all are there."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.watchdog.channel import listen
from pipeline.watchdog.coordinator import Coordinator
from pipeline.watchdog.monitor import Diagnosis
from pipeline.watchdog.watchdog import Watchdog
from pipeline.watchdog.worker import Worker

SECRET, TIMEOUT_S = 77, 5.0


def report(diagnosis: Diagnosis) -> None:
    print("\n".join([diagnosis.kind, diagnosis.text, *diagnosis.others]), flush=True)


def meet(watch: Watchdog, place: Path, rank: int, world: int) -> None:
    """Make progress until all ranks have been watched for a while."""
    watch.heartbeat.begin_step(6)
    watch.heartbeat.begin_step(7)
    watch.heartbeat.report("waiting for rank 1: hidden states of micro-batch 1")
    place.with_suffix(f".{rank}").touch()
    while not all(place.with_suffix(f".{peer}").exists() for peer in range(world)):
        time.sleep(0.01)
    time.sleep(0.5)


def work(watch: Watchdog, fault: str) -> int:
    """Do as ``fault`` says; return the exit code of a process that got that far."""
    if fault in ("killed", "terminated", "stopped"):
        sig = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "stopped": signal.SIGSTOP}[fault]
        os.kill(os.getpid(), sig)
    if fault == "fails":
        watch.fail("the disk is full", 2)
        return 2
    if fault == "leaves":
        watch.close()
        return 0
    if fault == "stuck":
        watch.heartbeat.report("a call into C")
        ctypes.PyDLL(None).sleep(60)  # holds Python's lock: no thread of this process runs
    if fault == "hangs":
        watch.heartbeat.report("a long forward")
    time.sleep(60)
    return 0


def main() -> int:
    rank, world, place = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["PORT_FILE"])
    log, fault = os.environ["LOG"], os.environ["FAULT"]
    with Path(log).open("a", encoding="utf-8") as stream:
        watch = Watchdog(
            rank=rank, world=world, place=f"host h, pid {os.getpid()}", timeout_s=TIMEOUT_S, log=stream, report=report,
            lost=lambda text, step: print(text, flush=True),
        )  # fmt: skip
        if rank == 0:
            listener = listen()
            part = place.with_suffix(".part")
            part.write_text(str(listener.getsockname()[1]))
            part.rename(place)
            watch.start(Coordinator(watch, listener, SECRET).run)
        else:
            while not place.is_file():
                time.sleep(0.01)
            watch.start(Worker(watch, ("localhost", int(place.read_text())), SECRET).run)
        meet(watch, place, rank, world)
        return work(watch, fault)


if __name__ == "__main__":
    sys.exit(main())
