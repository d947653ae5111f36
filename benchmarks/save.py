"""The cost of checkpoints: synchronous and asynchronous saves, a resume, and their checks, in multiples of a step.

Run from the repository root: ``python -m benchmarks.save [--ranks 2] [--width 448] [--layers 4] [--blocks 6]
[--packs DIR]``. The DeepSpeed launcher starts the trainer on a small demo; blocks of steps without a save, with a
synchronous and with an asynchronous one at their beginning take turns, so that what else the machine does falls on all
alike. A save's cost is how much longer than a block without one its block took, all of it: copying, writing beside the
steps, publishing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.planning.run_plan import RunPlan
    from pipeline.training.checkpoint_manager import CheckpointManager
    from pipeline.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]

STEPS = 4
"""Steps of a block."""
MODES = ("none", "synchronous", "asynchronous")


@dataclass(frozen=True)
class Block:
    """One block of steps, in seconds of rank 0."""

    mode: str
    seconds: float
    still: float
    """The part for which the save blocked training."""


@dataclass(frozen=True)
class Measured:
    """The measurements of rank 0."""

    megabytes: float
    """Bytes of one checkpoint, over all ranks."""
    resume_s: float
    """Seconds to hash and load it."""
    trained_again: int
    """Steps between the last save and the step from which the run resumes."""
    blocks: list[Block]
    checks: Checks


@dataclass(frozen=True)
class Checks:
    """Seconds that checks take on rank 0; medians."""

    save_s: float
    """A synchronous save, with its checks."""
    finite_s: float
    """Checking that all shards are finite."""
    hash_s: float
    """Hashing the file of a rank."""
    manifest_s: float
    """Reading a manifest and checking its hash."""
    step_s: float
    """Deciding after a step whether to save."""


def measure_checks(trainer: Trainer, folder: Path, blocks: Sequence[Block]) -> Checks:
    """Time the checks by themselves, on the shards of this rank and the newest checkpoint of a run folder."""
    from pipeline.checkpoints.base import hash_file
    from pipeline.checkpoints.checkpoint import checkpoint_folders
    from pipeline.checkpoints.manifest import rank_file, read_manifest
    from pipeline.checkpoints.shards import first_not_finite, shards

    own, newest = dict(shards(trainer._stage)), checkpoint_folders(folder)[0]
    step, manager = trainer.step + 1, trainer._checkpoints
    return Checks(
        save_s=statistics.median(block.still for block in blocks if block.mode == "synchronous"),
        finite_s=_median_s(lambda: first_not_finite(own)),
        hash_s=_median_s(lambda: hash_file(newest / rank_file(int(os.environ["RANK"])))),
        manifest_s=_median_s(lambda: read_manifest(newest)),
        step_s=_median_s(lambda: manager.after_step(step, healthy=True, stop=False), repeats=101),
    )


def _median_s(work: Callable[[], object], repeats: int = 11) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(words: Sequence[str], blocks: int) -> Measured:
    """Train in blocks; on every rank of a launched job."""
    from pipeline.checkpoints.checkpoint import load, newest_intact
    from pipeline.config.flags import parse
    from pipeline.parallel.launch import configure_libraries, fill_rank_variables, start_processes, stop_processes
    from pipeline.planning.run_plan import RunPlan
    from pipeline.training.checkpoint_manager import CheckpointManager
    from pipeline.training.run.folder import RunFolder
    from pipeline.training.trainer import Trainer
    from pipeline.watchdog.heartbeat import Heartbeat

    configure_libraries()
    fill_rank_variables()
    plan = RunPlan.build(parse(list(words)), rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
    folder = RunFolder(plan.config.run_dir)
    folder.create()
    start_processes(plan.config.parallel.timeout_s)
    trainer = Trainer(plan, folder, Heartbeat())
    savers = {mode: CheckpointManager(_with(plan, mode), folder, trainer._stage, step=0) for mode in MODES}
    steps = _steps(trainer)
    for _ in range(STEPS):
        next(steps)
    for mode in MODES[1:]:  # the first asynchronous save takes the memory that all later ones use
        _block(trainer, savers[mode], mode, steps)
    done = [_block(trainer, savers[mode], mode, steps) for _ in range(blocks) for mode in MODES]
    trainer._checkpoints = savers["synchronous"]
    trainer._checkpoints.save(last := trainer.step)
    began = time.monotonic()
    found, complaints = newest_intact(folder.path, rank=plan.topology.rank, world=plan.topology.world)
    assert found is not None and not complaints, complaints
    load(trainer._stage, found)
    took = time.monotonic() - began
    written = sum(path.stat().st_size for path in folder.path.glob(f"checkpoints/step-{last:08d}/*.safetensors"))
    checks = measure_checks(trainer, folder.path, done)
    stop_processes()
    return Measured(written / 1e6, took, last - found.manifest.step, done, checks)


def _with(plan: RunPlan, mode: str) -> RunPlan:
    kept = plan.config.checkpoint.model_copy(update={"asynchronous": mode == "asynchronous"})
    return replace(plan, config=plan.config.model_copy(update={"checkpoint": kept}))


def _steps(trainer: Trainer) -> Iterator[None]:
    """Train one step per iteration."""
    for batch, data_s in trainer._batches():
        trainer._train_step(batch, data_s, time.monotonic())
        yield


def _block(trainer: Trainer, saver: CheckpointManager, mode: str, steps: Iterator[None]) -> Block:
    trainer._checkpoints = saver
    saver.take_waited()
    began = time.monotonic()
    if mode != "none":
        saver.save(trainer.step)
    still = saver.take_waited()
    for _ in range(STEPS):
        next(steps)
    still += saver.take_waited()
    saver.finish()
    return Block(mode, time.monotonic() - began, still + saver.take_waited())


def _launch(ranks: int, arguments: Sequence[str]) -> None:
    """Start this file under the launcher."""
    with socket.socket() as probe:  # the launcher's own port may be in use
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port]
    command = [*launcher, str(Path(__file__).resolve()), *arguments]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(os.environ)
    done = subprocess.run(command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout[-4000:])


def _demo(folder: Path) -> Path:
    """Make a small demo; return its packs."""
    command = ["demo", str(folder / "demo"), "--scenes", "300", "--held-out", "12", "--workers", "2"]
    subprocess.run([sys.executable, "-m", "data_prep", *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / "demo/packs/sft"


def _words(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the trainer's flags."""
    steps = STEPS * (1 + len(MODES[1:]) + options.blocks * len(MODES))
    return [
        "--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--recipe", "demo_sft", "--run-dir", str(folder / "run"),
        "--data.packs", str(options.packs), "--log.tensorboard", "false", "--checkpoint.keep-last", "1",
        "--model.llm.config.hidden_size", str(options.width), "--model.llm.config.num_hidden_layers",
        str(options.layers), "--model.llm.config.intermediate_size", str(4 * options.width), "--train.steps",
        str(steps + 1), "--train.global-batch-size", str(2 * options.ranks), "--parallel.micro-batches", "2",
        "--log.spike-mads", "0",
    ]  # fmt: skip


def table(measured: Measured) -> str:
    """Return the figures as a table in Markdown."""
    seconds = {m: [block.seconds for block in measured.blocks if block.mode == m] for m in MODES}
    still = {m: statistics.median(block.still for block in measured.blocks if block.mode == m) for m in MODES}
    step = statistics.median(seconds["none"]) / STEPS
    lines = [
        f"checkpoint of {measured.megabytes:.0f} MB, step of {step:.2f} s, medians of {len(seconds['none'])} blocks",
        "",
        "| save | training stands still | costs in all |",
        "|---|---:|---:|",
    ]
    for mode in MODES[1:]:  # turn by turn against the block without a save beside it
        extra = statistics.median(ours - plain for ours, plain in zip(seconds[mode], seconds["none"], strict=True))
        lines.append(f"| {mode} | {still[mode] / step:.2f} steps | {extra / step:.2f} steps |")
    resume = f"{measured.resume_s / step:.2f} steps ({measured.resume_s:.2f} s)"
    lines += ["", f"resume: {resume}; steps trained again: {measured.trained_again}", "", *_check_lines(measured, step)]
    return "\n".join(lines)


def _check_lines(measured: Measured, step: float) -> list[str]:
    checks, load_s = measured.checks, measured.resume_s

    def ratio(whole: float, part: float) -> str:
        return f"{whole / (whole - part):.4f}"

    return [
        "| with the check / without it | a save | a load | a step |",
        "|---|---:|---:|---:|",
        f"| shards are hashed | {ratio(checks.save_s, checks.hash_s)} | {ratio(load_s, checks.hash_s)} | 1 |",
        f"| shards are finite | {ratio(checks.save_s, checks.finite_s)} | {ratio(load_s, checks.finite_s)} | 1 |",
        f"| manifest is hashed and typed | 1 | {ratio(load_s, checks.manifest_s)} | 1 |",
        f"| steps are healthy | 1 | 1 | {ratio(step, checks.step_s)} |",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--packs", type=Path, help="demo packs; made if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:  # launched as a file: its folder holds a pipeline.py
        sys.path[0] = str(ROOT)
        measured = measure(_words(options, options.worker), options.blocks)
        if os.environ["RANK"] == "0":
            (options.worker / "measured.json").write_text(json.dumps(asdict(measured)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        options.packs = options.packs or _demo(Path(scratch))
        sizes = [f"--{name}={getattr(options, name)}" for name in ("ranks", "width", "layers", "blocks", "packs")]
        _launch(options.ranks, ["--worker", scratch, *sizes])
        raw = json.loads(Path(scratch, "measured.json").read_text())
    print(
        table(
            Measured(
                **{**raw, "blocks": [Block(**block) for block in raw["blocks"]], "checks": Checks(**raw["checks"])}
            )
        )
    )
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
