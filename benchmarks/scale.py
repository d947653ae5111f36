"""AKI-4B and a 70B decoder on 64, 512 and 4,096 GPUs: what `mma estimate` predicts, and what limits each setting.

Run from the repository root: ``python -m benchmarks.scale``. Nothing is measured and no GPU is needed. A line is
``mma estimate benchmarks/models/NAME.yaml`` with its flags; docs/scale.md shows the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.commands.estimate import build_workload_estimate
from pipeline.config.flags import parse
from pipeline.config.schema import ModelConfig
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding, read_ds_config
from pipeline.planning.capacity import CUDA_BYTES
from pipeline.planning.estimate import GIB
from pipeline.planning.hardware import Hardware
from pipeline.planning.roofline import Roofline, Workload

MODELS = Path(__file__).parent / "models"
SEQ_LEN, IMAGES, TARGETS, SAMPLE_TOKENS = 8192, 27, 0.3, 300
NOTABLE = 0.1
"""An overhead below this share of the step limits nothing."""


class Case(NamedTuple):
    """A model on a number of GPUs with flags of the trainer."""

    model: str
    gpus: int
    rows: int
    """Rows of the global batch."""
    flags: str = ""


RELEASED = "--parallel.gathered-fraction 0 --parallel.reduce-once false"
INTERLEAVED = "--parallel.schedule interleaved --parallel.virtual-stages"
CASES = (
    Case("aki_4b", 64, 64),
    Case("aki_4b", 512, 512),
    Case("aki_4b", 512, 1024),
    Case("aki_4b", 4096, 4096),
    Case("aki_4b", 4096, 8192, f"--parallel.pp 4 {INTERLEAVED} 4"),
    Case("70b", 64, 64),
    Case("70b", 64, 64, RELEASED),
    Case("70b", 64, 256, "--parallel.pp 8 --parallel.reduce-once false"),
    Case("70b", 512, 512, "--parallel.pp 8 --parallel.reduce-once false"),
    Case("70b", 512, 1024, f"--parallel.pp 8 --parallel.reduce-once false {INTERLEAVED} 5"),
    Case("70b", 4096, 8192, f"--parallel.pp 8 --parallel.reduce-once false {INTERLEAVED} 5"),
)
COLUMNS = ("GPUs", "rows", "flags", "GiB", "ZeRO GB", "hidden GB", "bubble", "step s", "tokens/s a GPU", "MFU",
           "limited by")  # fmt: skip


@cache
def _spec(model: str) -> ModelSpec:
    config = parse(["--recipe", str(MODELS / f"{model}.yaml")]).config.model
    return _resolved(config)


def _resolved(config: ModelConfig) -> ModelSpec:
    return ModelSpec.resolve(config, vocab_size=int(config.llm.config["vocab_size"]), image_tokens=None)


def predict(case: Case) -> Roofline:
    """Return the predicted step of a case, as ``mma estimate`` computes it."""
    batch = ["--train.global-batch-size", str(case.rows)]
    config = parse(["--recipe", str(MODELS / f"{case.model}.yaml"), *batch, *case.flags.split()]).config
    work = Workload(IMAGES / SEQ_LEN, TARGETS, SAMPLE_TOKENS)
    sharding = Sharding.of(read_ds_config("zero3"), config.parallel)
    load = build_workload_estimate(
        config, sharding, _spec(case.model), ranks=case.gpus, seq_len=SEQ_LEN, shares=work[:2]
    )
    return Roofline(load, work, Hardware())


def memory_gib(step: Roofline) -> float:
    """Return the memory of a rank of the fullest stage in GiB, with CUDA's own."""
    stages = range(len(step.load.split.stage_layers))
    return (max(step.load.memory(stage).total for stage in stages) + CUDA_BYTES) / GIB


def limit(step: Roofline) -> str:
    """Return what breaks or slows a setting first: memory, else its largest overhead if that is notable."""
    if memory_gib(step) * GIB > step.hardware.memory_bytes:
        return "memory"
    overheads = {name: step.parts()[name] / step.step_s for name in ("host", "bubble", "communication", "update")}
    worst = max(overheads, key=overheads.__getitem__)
    return f"{worst} {overheads[worst]:.0%}" if overheads[worst] > NOTABLE else "-"


def table_line(case: Case) -> str:
    """Return a case as a row of the Markdown table."""
    step = predict(case)
    received = [step.bytes_per_step(stage) for stage in range(len(step.load.split.stage_layers))]
    zero = max(one["gather"] + one["reduce"] for one in received) / 1e9
    hidden = max(one["hidden"] for one in received) / 1e9
    cells = [
        f"{case.gpus:,}", f"{case.rows:,}", f"`{case.flags}`" if case.flags else "-", f"{memory_gib(step):,.0f}",
        f"{zero:,.0f}", f"{hidden:.1f}" if hidden else "-", f"{step.simulation.bubble:.0%}", f"{step.step_s:.2f}",
        f"{step.tokens_per_s / case.gpus:,.0f}", f"{step.mfu:.0%}", limit(step),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def lines(models: Sequence[str]) -> Iterator[str]:
    """Yield one table per model."""
    for model in models:
        yield f"{model}: {_spec(model).layers} layers of width {_spec(model).width:,}, rows of {SEQ_LEN:,} tokens"
        yield ""
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---:|---:|---|" + "---:|" * (len(COLUMNS) - 4) + "---|"
        yield from (table_line(case) for case in CASES if case.model == model)
        yield ""
    yield from (f"- {line}" for line in Hardware().lines())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["aki_4b", "70b"], choices=["aki_4b", "70b"])
    for line in lines(parser.parse_args(argv).models):
        print(line, flush=True)


if __name__ == "__main__":
    main()
