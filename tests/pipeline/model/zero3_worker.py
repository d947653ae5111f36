"""One rank of `test_zero3`: builds stages sharded over two ranks, takes one SGD step, saves its shards."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.schema import GateConfig, RunConfig
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.parallel.ds_config import complete_ds_config, read_ds_config
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage, sharder
from tests.pipeline.model.helpers import random_sidecars, stage_inputs, tiny_spec

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-true-zero3": {"llm": {"tie_word_embeddings": True}, "gathered_fraction": 0.0},
    "gemma3_text-clip": {"vision": "clip_vision_model"},
    "qwen3-gates": {"gate": GateConfig(kind="rave_style", rank=3), "checkpointing": True},
    "phi3-trained-tower-checkpointing": {"frozen": False, "checkpointing": True},
}
TARGETS = 50
"""Divisor of the loss: any number, the same on all ranks."""


def micro_batches(rank: int) -> list[StageInputs]:
    """Rank 0 sees images, then none; rank 1 sees none, then images but nothing to learn."""
    text = stage_inputs(random_sidecars(20 + rank, 2, padding=3, text_only=True), dtype=torch.float32)
    images = stage_inputs(random_sidecars(30 + rank, 3, padding=2), dtype=torch.float32)
    return [images, text] if rank == 0 else [text, replace(images, labels=torch.full_like(images.labels, IGNORE))]


def spec_of(name: str) -> Any:
    case = CASES[name]
    spec = tiny_spec(name.split("-")[0], vision=case.get("vision", "siglip_vision_model"), **case.get("llm", {}))
    return replace(spec, vision_frozen=case.get("frozen", True), gate=case.get("gate", GateConfig()))


def train_step(name: str, topology: Topology, groups: Any, out: Path) -> None:
    case, spec = CASES[name], spec_of(name)
    config = RunConfig.model_validate({"train": {"clip_norm": 0.0}, "log": {"tensorboard": False}})
    ds_config = complete_ds_config(read_ds_config("ds_configs/zero3.json"), config, microbatch_rows=1, bf16=False)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    module = build_stage(
        spec, layers=range(spec.layers), first=True, last=True, dtype=torch.float32, device="cpu", seed=3,
        reads=topology.dp_rank == 0, shard=sharder(topology, groups, ds_config),
        gradient_checkpointing=case.get("checkpointing", False),
    )  # fmt: skip
    optimizer = torch.optim.SGD([param for param in module.parameters() if param.requires_grad], lr=1.0)
    gathered_fraction = case.get("gathered_fraction", 1.0)
    stage = Zero3Stage(
        module, optimizer, topology=topology, groups=groups, ds_config=ds_config, gathered_fraction=gathered_fraction,
        reduce_once=gathered_fraction > 0,
    )  # fmt: skip
    runner = Runner(stage, topology=topology, groups=groups, width=spec.width, dtype=torch.float32, schedule="1f1b")
    loss = runner.run(micro_batches(topology.rank), topology.dp / TARGETS).sum()
    assert stage.step(1.0).applied
    shards = {name: stage.master_shard(param).clone() for name, param in stage.trainable()}
    torch.save({"loss": loss, "shards": shards}, out / f"{name}-{topology.rank}.pt")


def main() -> None:
    fill_rank_variables()
    start_processes(120)
    topology = Topology(dist.get_world_size(), dist.get_rank(), 1)
    groups = create_groups(topology)
    for name in CASES:
        train_step(name, topology, groups, Path(sys.argv[-1]))
    print(json.dumps({"done": list(CASES)}))
    stop_processes()


if __name__ == "__main__":
    main()
