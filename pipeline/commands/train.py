"""``mma train``: train with one command; several ranks on this machine are started by the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data_prep.common.command_line import OneLineParser, positive_int
from data_prep.common.errors import UserError
from pipeline.config.flags import DESCRIPTION, build_parser, parse
from pipeline.config.shipped import ds_config_path

TRAINER = Path(__file__).parents[1] / "train.py"
LAUNCHED_BY = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables that hold the number of ranks in a process that a launcher has started."""
MAX_RANKS_PER_CORE = 8
USAGE = "mma train [--ranks N] [--recipe NAME] [--deepspeed NAME] [--run-dir DIR] [--section.key VALUE ...]"


@dataclass(frozen=True)
class TrainCommand:
    """A parsed ``mma train``: either start ``ranks`` processes, or run the trainer in this one."""

    words: list[str]
    """Flags of the trainer."""
    ranks: int
    """Processes to start; 0 = this process is a rank, or the only one."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> TrainCommand:
        """Check all flags before any process starts. Raises UserError."""
        own = OneLineParser("mma train", add_help=False, allow_abbrev=False)
        _add_ranks(own)
        options, words = own.parse_known_args(list(argv))
        if {"-h", "--help", "--print-config"} & set(words):
            return cls(words, 0)
        invocation = parse(words, known=("--ranks",))
        ds_config_path(invocation.deepspeed)
        if invocation.dry_run:
            return cls(words if invocation.ranks else _with_ranks(words, options.ranks), 0)
        launched = next((int(os.environ[name]) for name in LAUNCHED_BY if os.environ.get(name, "").isdecimal()), 0)
        if launched > 1 or "RANK" in os.environ:
            if options.ranks not in (None, launched):
                raise UserError(f"--ranks {options.ranks}: a launcher has started {launched} ranks: drop --ranks")
            return cls(words, 0)
        ranks = options.ranks or _gpus() or 1
        check_ranks(ranks)
        return cls(words, ranks if ranks > 1 else 0)


def check_ranks(ranks: int) -> None:
    """Raise UserError for far more processes than this machine has cores."""
    cores = os.cpu_count() or 1
    if ranks > MAX_RANKS_PER_CORE * cores:
        raise UserError(f"--ranks {ranks}: this machine has {cores} CPU cores; start fewer ranks")


def add_train(commands: Any, help_text: str) -> None:
    """Add ``train`` to the commands, with ``--ranks`` and all flags of the trainer, for help and completion."""
    parser = commands.add_parser(
        "train", help=help_text, parents=[build_parser()], add_help=False, usage=USAGE, description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve",
    )  # fmt: skip
    _add_ranks(parser)


def start_ranks(command: TrainCommand) -> NoReturn:
    """Replace this process by the DeepSpeed launcher with the trainer's ranks."""
    from pipeline.parallel.launch import configure_libraries, free_port  # imports torch, which takes seconds

    configure_libraries()  # sets DeepSpeed's accelerator for the launcher, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    port = os.environ.get("MASTER_PORT") or str(free_port())
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet"]
    launcher += ["--num_accelerators", str(command.ranks), "--master_port", port]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, str(TRAINER), *command.words])


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    text = "training processes on this machine (default: one per GPU, or 1); not under srun, mpiexec or deepspeed"
    parser.add_argument("--ranks", type=positive_int, metavar="N", help=text)


def _gpus() -> int:
    import torch  # takes seconds; needed only without --ranks

    return torch.cuda.device_count()


def _with_ranks(words: list[str], ranks: int | None) -> list[str]:
    """Let a dry run plan for ``--ranks``."""
    return words if ranks is None else [f"--dry-run={ranks}" if word == "--dry-run" else word for word in words]
