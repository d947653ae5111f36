"""Entry point of training: ``deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # run as a file: modules in this folder must not shadow packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.common.errors import UserError
from pipeline.config.flags import parse
from pipeline.config.recipes import to_yaml
from pipeline.training.run.redact import redact


def main(argv: Sequence[str] | None = None) -> int:
    """Train from a recipe and flags; return the exit code: 0 done or stopped, 2 user error, 1 any other failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        invocation = parse(words)
        for note in invocation.notes if is_rank0() else ():
            print(f"note: {redact(note)}", file=sys.stderr, flush=True)
        if invocation.print_config:
            print(to_yaml(invocation.config), end="")
            return 0
        return _load_trainer()(invocation, debug=debug)
    except UserError as error:
        if debug:
            raise
        return _report(error)
    except KeyboardInterrupt:
        return 130


def _load_trainer() -> Callable[..., int]:
    """Import torch and DeepSpeed, which takes seconds that ``--help`` and a misspelt flag should not cost.

    Garbage collection is off during the imports and ignores modules afterwards: they live until the process ends.
    """
    gc.disable()
    try:
        from pipeline.parallel.launch import configure_libraries

        configure_libraries()  # before DeepSpeed is imported
        from pipeline.training.run_training import run_training

        return run_training
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> NoReturn:
    """End the process. On failure exit immediately: interpreter shutdown may block on a stuck collective or file."""
    if code == 0:
        sys.exit()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def is_rank0() -> bool:
    """Return whether this process is rank 0, before the rank variables of Slurm and MPI are read."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _report(error: UserError) -> int:
    """Print one line, on rank 0 only: every rank sees the same error."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    leave(main())
