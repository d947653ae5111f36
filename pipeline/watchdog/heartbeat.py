"""What this rank does at the moment, in words and as the watchdog can see it from outside."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

LOOK_AFTER_S = 1.0
"""What takes longer than this is looked at: where in the code is it?"""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/comm/")


class Heartbeat:
    """What the training loop says that it does; said many times a step, read once a second by another thread."""

    def __init__(self) -> None:
        """Start at step 0."""
        self.step = self.begun = 0
        self._now = (0, "starting", time.monotonic())
        self._thread = threading.get_ident()

    def begin_step(self, step: int) -> None:
        """Say which step, counted from 1, is begun."""
        self.step = step
        self.begun += 1

    def doing(self, words: str) -> None:
        """Say what is begun; words that begin with "waiting for" tell that other ranks are waited for."""
        self._now = (self._now[0] + 1, words, time.monotonic())

    @property
    def words(self) -> str:
        """What was said last, and when in the run."""
        return f"{self._now[1]}, step {self.step}"

    def message(self) -> dict[str, Any]:
        """Return what is told to rank 0."""
        count, words, since = self._now
        where, held = "", False
        if time.monotonic() - since > LOOK_AFTER_S:
            where, held = self._look()
        waits = held or words.startswith("waiting for")
        news = {"step": self.step, "begun": self.begun, "count": count}
        return {**news, "doing": words, "where": where, "waits": waits}

    def _look(self) -> tuple[str, bool]:
        """Return the innermost frame of the training thread, and whether a collective, or a GPU, holds it.

        Backwards on GPUs run in threads of torch's own, which Python's list of threads does not have.
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
    """Whether one of the innermost frames waits for other ranks, or for a GPU, where most waiting is for them."""
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
