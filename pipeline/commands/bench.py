"""``mma bench``: the paper's benchmarks on an exported model."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError
from data_prep.common.workers import parse_share
from pipeline.commands.arguments import existing_device
from pipeline.commands.model import add_model

if TYPE_CHECKING:
    from pipeline.evaluation.asking import Model
    from pipeline.evaluation.bench import Candidate, Settings

BENCH = """\
Run the paper's benchmarks on an exported model: official files, official prompts, official scoring rules.
docs/evaluation.md tells where to get the files and which rules are followed.

  mme-p mme-c mmbench seed-i llava-w mmmu mathvista pope mm-vet realworldqa cv-bench-2d cv-bench-3d
  vqa gqa boxes captions      your own questions.jsonl with the metrics of VQAv2, GQA, RefCOCO and COCO captions

  mma bench pope,mme-p --model models/demo --data bench_data
  mma bench all --model models/mma --compare models/causal --data bench_data
  mma bench mm-vet --model models/mma --data bench_data --judge-url http://localhost:8000/v1 --judge-model NAME
  mma bench all --model M --data D --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Answers are kept batch by batch: the same command continues an interrupted run. LLaVA-W, MM-Vet and MathVista need a
judge; without one, `all` skips them."""


def _bench(arguments: argparse.Namespace) -> None:
    from data_prep.common.console import PipeConsole
    from pipeline.evaluation.bench import run
    from pipeline.evaluation.registry import ALL, chosen
    from pipeline.evaluation.table import show

    benchmarks = chosen(arguments.names)
    settings = _settings(arguments)
    candidates = _candidates(arguments)
    outcome = run(benchmarks, candidates, settings, _say, skip=arguments.names == ALL)
    if not outcome.lines:
        return
    names = [one.folder.name for one in candidates]
    show(outcome.lines, names, outcome.skipped, PipeConsole())
    print(f"prompts, rules, scores and every answer: {' and '.join(str(one.out) for one in candidates)}")


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
        Candidate(folder, out, partial(_load, folder, arguments.device, arguments.verify))
        for folder, out in zip(folders, outs, strict=True)
    ]


def _load(folder: Path, device: str, verify: Literal["quick", "full"]) -> Model:
    from pipeline.serving.model import load_model

    device = existing_device(device)
    if device == "cuda":
        device = f"cuda:{_gpu_of_rank()}"
    model = load_model(folder, device=device, verify=verify)
    if model.coverage is not None and not model.coverage.complete:
        _say(f"{folder}: {model.coverage}; --verify full checks every byte")
    return model


def _gpu_of_rank() -> int:
    import torch

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return int(rank) % torch.cuda.device_count()


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma bench``."""
    parser.add_argument("names", metavar="NAME[,NAME]|all", help="benchmarks; all: the paper's that can be run")
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with one sub-folder per benchmark")
    parser.add_argument("--compare", metavar="DIR", help="second model folder: paired differences with 95 %% intervals")
    parser.add_argument("--out", metavar="DIR", help="folder for answers and scores (default: MODEL/bench)")
    parser.add_argument(
        "--shard", metavar="i/n", help="answer share i of n, 0-based (default: the rank under torchrun or srun)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="questions per batch (default: 16)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, metavar="N", help="limit of an answer (default: per benchmark)"
    )
    parser.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible API, e.g. http://localhost:8000/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="name of the judge in its API")
    parser.add_argument(
        "--judge-key-env",
        default="MMA_JUDGE_KEY",
        metavar="VARIABLE",
        help="environment variable that holds the key (default: MMA_JUDGE_KEY)",
    )
    parser.set_defaults(command=_bench)
