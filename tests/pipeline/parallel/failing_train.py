"""``pipeline/train.py`` with a fault put in from outside: FAULT RANK STEP, then the trainer's own words."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from pipeline.parallel.runner import Runner
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.train import main
from pipeline.training import writing
from pipeline.training.manifest import rank_file

FAULTS = ("not-a-number", "killed-in-step", "killed-in-save")


def own_rank() -> int:
    return int(os.environ["RANK"])


def poison_gradient(rank: int, step: int) -> None:
    """Make one gradient shard not a number after the backwards of one step."""
    run, calls = Runner.run, [0]

    def poisoned(self: Runner, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = run(self, *args, **kwargs)
        calls[0] += 1
        if (own_rank(), calls[0]) == (rank, step):
            stage = self._stage
            stage.gradient_shard(next(param for _, param in stage.trainable()))[0] = torch.nan
        return loss

    Runner.run = poisoned  # type: ignore[method-assign]


def kill_in_step(rank: int, step: int) -> None:
    """Kill the process between two backwards of one step."""
    run, backward, calls = Runner.run, Zero3Stage.backward, [0, 0]

    def counted(self: Runner, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[:] = [calls[0] + 1, 0]
        return run(self, *args, **kwargs)

    def deadly(self: Zero3Stage, *args: Any, **kwargs: Any) -> None:
        calls[1] += 1
        if (own_rank(), *calls) == (rank, step, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        backward(self, *args, **kwargs)

    Runner.run, Zero3Stage.backward = counted, deadly  # type: ignore[method-assign]


def kill_in_save(rank: int, step: int) -> None:
    """Kill the process once its shard of the checkpoint of one step is half written."""
    write = writing._write

    def torn(own: Any, folder: Any, own_rank: int, tokenizer: Any) -> Any:
        files = write(own, folder, own_rank, tokenizer)
        if own_rank == rank and f"{step:08d}" in str(folder):
            path = folder / rank_file(own_rank)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    writing._write = torn


if __name__ == "__main__":
    launcher, (fault, rank, step), words = sys.argv[1:2], sys.argv[2:5], sys.argv[5:]
    assert fault in FAULTS
    {"not-a-number": poison_gradient, "killed-in-step": kill_in_step, "killed-in-save": kill_in_save}[fault](
        int(rank), int(step)
    )
    sys.exit(main([*launcher, *words]))
