"""``mma bench``: the paper's benchmarks on an exported model."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError
from data_prep.common.workers import parse_share

if TYPE_CHECKING:
    from pipeline.evaluation.asking import Model
    from pipeline.evaluation.bench import Candidate, Settings

_NAMES = (
    *("mme-p", "mme-c", "mmbench", "seed-i", "llava-w", "mmmu", "mathvista", "pope", "mm-vet", "realworldqa"),
    *("cv-bench-2d", "cv-bench-3d"),
)
_EPILOG = f"""\
The paper's benchmarks: {", ".join(_NAMES)}.
With your own questions.jsonl: vqa, gqa, boxes, captions. docs/evaluation.md tells where to get the files.

examples:
  mma bench pope,mme-p --model models/demo --data benchmarks_data
  mma bench all --model models/mma --compare models/causal --data benchmarks_data
  mma bench mm-vet --model models/mma --data benchmarks_data --judge-url http://localhost:8000/v1 --judge-model NAME
  sbatch --array=0-7 ... mma bench all --model M --data D --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
"""


def _bench(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipeline.evaluation.bench import run
    from pipeline.evaluation.registry import ALL, chosen
    from pipeline.evaluation.table import show

    benchmarks = chosen(arguments.names)
    settings = _settings(arguments)
    candidates = _candidates(arguments)
    outcome = run(benchmarks, candidates, settings, _say, skip=arguments.names == ALL)
    if not outcome.lines:
        return
    show(outcome.lines, arguments.model, arguments.compare, outcome.skipped, Console())
    print(f"scores and every answer: {' and '.join(str(one.out) for one in candidates)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    from pipeline.evaluation.asking import rank_shard
    from pipeline.evaluation.bench import Settings
    from pipeline.evaluation.judge import JudgeSettings

    return Settings(
        data=Path(arguments.data),
        judge=JudgeSettings.find(arguments.judge_url, arguments.judge_model, arguments.judge_key_env),
        shard=parse_share(arguments.shard) if arguments.shard else rank_shard(),
        limit=arguments.limit,
        batch=arguments.batch,
        max_new_tokens=arguments.max_new_tokens,
    )


def _candidates(arguments: argparse.Namespace) -> list[Candidate]:
    from pipeline.evaluation.bench import Candidate

    folders = [Path(name) for name in (arguments.model, arguments.compare) if name]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"--compare {arguments.compare} is the model itself: name another export")
    outs = [Path(arguments.out) / folder.name if arguments.out else folder / "bench" for folder in folders]
    if len(set(outs)) < len(outs):
        raise UserError(f"--out: both models are named {folders[0].name}: leave --out away, or rename one")
    return [
        Candidate(folder, out, partial(_load, folder, arguments.device))
        for folder, out in zip(folders, outs, strict=True)
    ]


def _load(folder: Path, device: str) -> Model:
    import torch

    from pipeline.serving.model import load_model

    if device == "auto":
        rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU here; use --device cpu")
    return load_model(folder, device=device)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("names", metavar="NAME[,NAME]|all", help="benchmarks; all: the paper's that can be run")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with one sub-folder per benchmark")
    parser.add_argument("--compare", metavar="DIR", help="second model folder: paired differences with 95 %% intervals")
    parser.add_argument("--out", metavar="DIR", help="where answers and scores go; default: bench/ in the model folder")
    parser.add_argument(
        "--shard", metavar="i/n", help="ask the i-th of n shares (0-based); default: torchrun or srun rank"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="questions asked together")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="default: each benchmark's own limit")
    parser.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible API, e.g. http://localhost:8000/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="model the judge's API runs")
    parser.add_argument(
        "--judge-key-env", default="MMA_JUDGE_KEY", metavar="VARIABLE", help="environment variable that holds the key"
    )
    parser.set_defaults(command=_bench)
