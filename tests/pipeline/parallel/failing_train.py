"""``pipeline/train.py`` with a fault put in from outside: FAULT RANK STEP, then the trainer's own words."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.checkpoints import writing
from pipeline.checkpoints.manifest import rank_file
from pipeline.parallel.runner import Runner
from pipeline.parallel.zero3 import Zero3Stage
from pipeline.train import leave, main
from pipeline.training.trainer import Trainer


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


def hang_in_step(rank: int, step: int) -> None:
    """Sleep for ever in the second forward of one step."""
    run, forward, calls = Runner.run, Zero3Stage.forward, [0, 0]

    def counted(self: Runner, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[:] = [calls[0] + 1, 0]
        return run(self, *args, **kwargs)

    def asleep(self: Zero3Stage, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[1] += 1
        while (own_rank(), *calls) == (rank, step, 2):
            time.sleep(3600)
        return forward(self, *args, **kwargs)

    Runner.run, Zero3Stage.forward = counted, asleep  # type: ignore[method-assign]


def stop_in_step(rank: int, step: int) -> None:
    """Stop the process, as ``kill -STOP`` does, in the second forward of one step."""
    _do_in_step(rank, step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stick_in_step(rank: int, step: int) -> None:
    """Call C code that never returns and keeps Python's lock, in the second forward of one step."""

    def stuck() -> None:
        while True:  # a signal ends the sleep
            ctypes.PyDLL(None).sleep(3600)

    _do_in_step(rank, step, stuck)


def _do_in_step(rank: int, step: int, deed: Callable[[], object]) -> None:
    run, forward, calls = Runner.run, Zero3Stage.forward, [0, 0]

    def counted(self: Runner, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[:] = [calls[0] + 1, 0]
        return run(self, *args, **kwargs)

    def doing(self: Zero3Stage, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[1] += 1
        if (own_rank(), *calls) == (rank, step, 2):
            deed()
        return forward(self, *args, **kwargs)

    Runner.run, Zero3Stage.forward = counted, doing  # type: ignore[method-assign]


def fail_in_step(rank: int, step: int) -> None:
    """Raise what nobody expects on one rank."""
    run, calls = Runner.run, [0]

    def broken(self: Runner, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        if (own_rank(), calls[0]) == (rank, step):
            raise ZeroDivisionError("a bug of this rank\nin two lines")
        return run(self, *args, **kwargs)

    Runner.run = broken  # type: ignore[method-assign]


def poison_token(token: int, step: int) -> None:
    """Embed one token as not a number: rows that hold it have no finite loss."""
    start = Trainer.__init__

    def embed(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], torch.nan)

    def poisoned(self: Trainer, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for module in self._stage.module.modules():
            if isinstance(module, torch.nn.Embedding) and module.weight.ds_shape[0] > token:
                module.register_forward_hook(embed)

    Trainer.__init__ = poisoned  # type: ignore[method-assign]


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


FAULTS = {
    "not-a-number": poison_gradient, "killed-in-step": kill_in_step, "killed-in-save": kill_in_save,
    "hangs": hang_in_step, "fails": fail_in_step, "poisoned-token": poison_token,
    "stopped": stop_in_step, "stuck": stick_in_step,
}  # fmt: skip

if __name__ == "__main__":
    fault, rank, step, *words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    FAULTS[fault](int(rank), int(step))
    leave(main(words))
