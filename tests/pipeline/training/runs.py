"""Short real training runs on the small demo, and what they leave behind."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.checkpoint import open_checkpoint
from tests.launch import ROOT, Finished, Launcher, run

STEPS = 6
TINY = [
    "--model.llm.config.hidden_size", "32", "--model.llm.config.intermediate_size", "64",
    "--model.llm.config.num_hidden_layers", "2", "--model.vision.config.hidden_size", "32",
    "--model.vision.config.intermediate_size", "32", "--train.steps", str(STEPS), "--train.warmup-steps", "2",
    "--train.global-batch-size", "12", "--parallel.micro-batches", "0", "--log.every-steps", "1",
    "--log.tensorboard", "false",
]  # fmt: skip
COMPARED = ("step", "loss", "lr", "grad_norm", "targets", "tokens", "images", "consumed_packs")


def flags(demo: Path, run_dir: Path, *more: str, recipe: str = "demo_sft", packs: str = "sft") -> list[str]:
    """Flags of a short run; later ones win."""
    where = ["--run-dir", str(run_dir), "--data.packs", str(demo / "packs" / packs), "--checkpoint.every-steps", "2"]
    return ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--recipe", recipe, *where, *TINY, *more]


def train(
    demo: Path,
    run_dir: Path,
    *more: str,
    ranks: int = 2,
    timeout_s: float = 1200,
    launcher: Launcher = "srun",
    **kind: str,
) -> Finished:
    """Run training to its end."""
    words = flags(demo, run_dir, *more, **kind)
    return run(ranks, ROOT / "pipeline/train.py", *words, timeout_s=timeout_s, launcher=launcher)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let jobs started within write no file beyond ``size`` bytes: what a full disk does, and needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for_step(run_dir: Path, step: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while len(metrics(run_dir)) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout_s} s"
        time.sleep(0.02)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """What of the metrics must not depend on interruptions."""
    return [{name: line[name] for name in COMPARED} for line in metrics(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """All parameters of the newest checkpoint."""
    return dict(open_checkpoint(run_dir).parameters())


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
