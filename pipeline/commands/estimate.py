"""``mma estimate``: memory, bubble and predicted speed of a recipe on any number of ranks, without packs or GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from data_prep.common.console import PipeConsole
from pipeline.config.flags import parse
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding, read_ds_config
from pipeline.parallel.topology import Topology, micro_batches
from pipeline.planning.dry_run import millions, shown_bubble, shown_layers
from pipeline.planning.estimate import GIB, WorkloadEstimate
from pipeline.planning.hardware import Hardware
from pipeline.planning.roofline import Roofline, Workload
from pipeline.planning.stage_split import StageSplit

HARDWARE_FLAGS = ("--gpu", "--gpus-per-node", "--network-gbps", "--matrix-share", "--host-us")


def estimate(options: argparse.Namespace) -> int:
    """Print one table per number of ranks; return 0. Raises UserError for an invalid recipe, key or grid."""
    flags = ("--ranks", "--seq-len", "--vocab", "--images", "--targets", "--sample-tokens", *HARDWARE_FLAGS)
    invocation = parse(["--recipe", options.recipe, *options.flags], known=flags)
    config = invocation.config
    sharding = Sharding.of(read_ds_config(invocation.deepspeed), config.parallel)
    spec = ModelSpec.resolve(config.model, vocab_size=options.vocab, image_tokens=None)
    shares = options.images / options.seq_len, options.targets
    console = PipeConsole()
    for note in invocation.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    hardware, work = hardware_of(options), Workload(*shares, options.sample_tokens)
    for ranks in options.ranks:
        load = build_workload_estimate(config, sharding, spec, ranks=ranks, seq_len=options.seq_len, shares=shares)
        console.print(table(load, f"{Path(options.recipe).stem} on {ranks} ranks"))
        for line in prediction(Roofline(load, work, hardware)):
            console.print(line, soft_wrap=True, highlight=False)
    console.print("Predicted from a roofline, not measured. Assumptions:", soft_wrap=True)
    for line in hardware.lines():
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    return 0


def hardware_of(options: argparse.Namespace) -> Hardware:
    """Return the hardware that the flags of the command describe. Raises ConfigError for an unknown GPU."""
    return Hardware(
        options.gpu, gpus_per_node=options.gpus_per_node, network_gbs=options.network_gbps / 8,
        matrix_share=options.matrix_share, host_us=options.host_us,
    )  # fmt: skip


def prediction(step: Roofline) -> list[str]:
    """Return the predicted step in words: speed, then where its time goes."""
    if not step.load.is_predictable:
        return ["predicted: nothing; the roofline knows neither fp32 nor offload"]
    parts = ", ".join(f"{name} {seconds * 1000:,.0f}" for name, seconds in step.parts().items() if seconds >= 5e-4)
    bound = "; the host limits it: larger micro-batches" if step.is_host_bound else ""
    return [
        f"predicted: {step.step_s:.2f} s a step, {step.tokens_per_s:,.0f} tokens/s, {step.samples_per_s:,.0f} "
        f"samples/s, MFU {step.mfu:.1%}, {step.images_per_s:,.0f} images/s a rank of the first stage{bound}",
        f"  ms of the busiest stage: {parts}",
    ]


def build_workload_estimate(
    config: RunConfig, sharding: Sharding, spec: ModelSpec, *, ranks: int, seq_len: int, shares: tuple[float, float]
) -> WorkloadEstimate:
    """Estimate a model on a grid of ranks; ``shares``: images and supervised tokens per token. Raises ConfigError."""
    if seq_len < spec.image_tokens:
        raise ConfigError(f"--seq-len {seq_len} cannot hold one image of {spec.image_tokens} tokens")
    topology = Topology(ranks, 0, config.parallel.pp)
    microbatches, microbatch_rows = micro_batches(
        config.train.global_batch_size, topology.dp, config.parallel.micro_batches
    )
    split = StageSplit.of(spec, config, image_share=shares[0], target_share=shares[1])
    bf16 = config.train.dtype != "fp32"  # "auto" means bf16 on GPUs, which the estimate is for
    return WorkloadEstimate(config, sharding, spec, split, topology.dp, microbatches, microbatch_rows * seq_len, bf16)


def work_shares(load: WorkloadEstimate) -> list[float]:
    """Return each stage's fraction of a step's floating-point operations."""
    work = [
        sum(sum(load.split.work(stage, virtual_stage)) for virtual_stage in range(len(own)))
        for stage, own in enumerate(load.split.stage_layers)
    ]
    return [stage / sum(work) for stage in work]


def table(load: WorkloadEstimate, title: str) -> Table:
    """Return one line per stage; memory is in GiB per rank: sharded states, gathered parameters, activations, total."""
    stages, parallel = len(load.split.stage_layers), load.config.parallel
    grid = (
        f"{stages} stages x {load.dp} data-parallel ranks, {load.microbatches} micro-batches "
        f"of {load.microbatch_tokens:,} tokens, "
        f"{parallel.schedule}, bubble {shown_bubble(load)}, {millions(load.split.counts.total)} parameters, "
        f"{'bf16' if load.bf16 else 'fp32'}, {load.sharding}"
    )
    out = Table(title=title, caption=grid, title_justify="left", caption_justify="left")
    for name in ("stage", "layers", "trained", "frozen", "work", "states", "gathered", "activ.", "GiB"):
        out.add_column(name, justify="right")
    for stage, work in enumerate(work_shares(load)):
        (trained, frozen), need, split = (
            load.split.parameters(stage),
            load.memory(stage),
            load.split.stage_layers[stage],
        )
        parts = (need.states, need.gathered, need.activations + need.losses, need.total)
        memory = [f"{part / GIB:.2f}" for part in parts]
        row = [str(stage), shown_layers(split), millions(trained), millions(frozen), f"{work:.1%}"]
        out.add_row(*row, *memory)
    return out
