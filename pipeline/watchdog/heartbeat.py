"""What this rank is doing, as its watchdog reports it: the activity it announced and where its code is."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

INSPECT_AFTER_S = 1.0
"""The stack of the training thread is inspected when an activity lasts longer than this."""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/comm/")


class Heartbeat:
    """The current step and activity: updated many times a step, read once a second by the watchdog's thread."""

    def __init__(self) -> None:
        """Start at step 0."""
        self.step = self.begun = 0
        self._current = (0, "starting", time.monotonic())
        self._thread = threading.get_ident()

    def begin_step(self, step: int) -> None:
        """Record that a step begins, counted from 1."""
        self.step = step
        self.begun += 1

    def report(self, activity: str) -> None:
        """Record what begins now. An activity that begins with "waiting for" waits for other ranks."""
        self._current = (self._current[0] + 1, activity, time.monotonic())

    @property
    def activity(self) -> str:
        """The last reported activity and its step."""
        return f"{self._current[1]}, step {self.step}"

    def message(self) -> dict[str, Any]:
        """Return the heartbeat sent to the coordinator."""
        count, activity, since = self._current
        where, in_collective = "", False
        if time.monotonic() - since > INSPECT_AFTER_S:
            where, in_collective = self._inspect_stack()
        waits = in_collective or activity.startswith("waiting for")
        progress = {"step": self.step, "begun": self.begun, "count": count}
        return {**progress, "activity": activity, "where": where, "waits": waits}

    def _inspect_stack(self) -> tuple[str, bool]:
        """Return the innermost frame of the training thread, and whether a collective or a GPU blocks it.

        Backwards on GPUs run in torch's own threads, which are missing from Python's list of threads.
        """
        frames = sys._current_frames()
        known = {thread.ident for thread in threading.enumerate()}
        own = frames.get(self._thread)
        if own is None:
            return "", False
        others = [frame for ident, frame in frames.items() if ident not in known]
        place = f"{Path(own.f_code.co_filename).name}:{own.f_lineno or '?'} in {own.f_code.co_name}"
        return place, any(_waits_for_others(frame) for frame in (own, *others))


def _waits_for_others(frame: FrameType | None) -> bool:
    """Whether one of the innermost frames waits for other ranks, or for a GPU, which usually waits for other ranks."""
    for depth in range(3):
        if frame is None:
            return False
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        handle = depth == 0 and name == "wait" and "/deepspeed/" in path
        gpu = depth == 0 and name == "synchronize" and "torch/cuda/" in path
        if handle or gpu or any(part in path for part in _COLLECTIVES):
            return True
        frame = frame.f_back
    return False
