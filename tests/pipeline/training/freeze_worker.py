"""One of two ranks that trains a tiny model for 20 steps under each freeze pattern, and saves what it saw."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload

from pipeline.config.schema import RunConfig
from pipeline.model.build import build_stage
from pipeline.model.trainable import Trainable
from pipeline.model.weights import parameter_shapes
from pipeline.parallel.ds_config import complete_ds_config, read_ds_config
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.partition import joined, split_stages
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage, sharder
from pipeline.training.engine import parameter_groups
from tests.pipeline.parallel.grid_worker import grid_spec, micro_batch, number_from_zero, target_count

RANKS, STEPS, LAYERS, LR = 2, 20, 4, 1e-3


@dataclass(frozen=True)
class Case:
    """What is frozen, and the grid."""

    freeze: tuple[str, ...]
    pp: int = 1
    virtual_stages: int = 1
    zero: str = "zero3"
    tied: bool = False
    lr_of: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{'+'.join(self.freeze)}-pp{self.pp}x{self.virtual_stages}-{self.zero}{'-tied' * self.tied}"

    @property
    def whole(self) -> Case:
        """The same without stages."""
        return replace(self, pp=1, virtual_stages=1, zero="zero3")

    def rule(self) -> tuple[Trainable, RunConfig]:
        train = {"freeze": list(self.freeze), "lr": LR, "lr_of": self.lr_of, "eps": 1e-5, "clip_norm": 0.1}
        config = RunConfig.model_validate({"train": train, "log": {"tensorboard": False}})
        spec = grid_spec(self.tied, LAYERS)
        return Trainable.of(spec, config.train, dict(parameter_shapes(spec))), config


CONNECTOR_ONLY = Case(("llm",), pp=2)
CASES = [
    CONNECTOR_ONLY,
    Case(("llm",), pp=2, virtual_stages=2, zero="zero3_offload"),
    Case(("connector", "model.embed_tokens", "model.layers.0", "model.layers.1"), pp=2),
    Case(("connector", "model.embed_tokens", "model.layers.0", "model.layers.2"), pp=2, virtual_stages=2),
    Case(("*.mlp", "model.layers.1.*", "lm_head"), pp=2, lr_of={"connector": 1e-2, "model.layers.3": 1e-4}),
    Case(("model.embed_tokens",), pp=2, tied=True),
]


def train(case: Case, topology: Topology, groups: Any) -> dict[str, Any]:
    """Train; return this rank's shards before and after, the losses and norms."""
    trainable, config = case.rule()
    ds_config = complete_ds_config(read_ds_config(case.zero), config, microbatch_rows=1, bf16=False)
    virtual_stages = split_stages(LAYERS, case.pp, case.virtual_stages)[topology.stage]
    module = build_stage(
        grid_spec(case.tied, LAYERS), layers=joined(virtual_stages), first=topology.first, last=topology.last,
        dtype=torch.float32, device="cpu", seed=3, reads=topology.dp_rank == 0,
        shard=sharder(topology, groups, ds_config), trains=trainable.trains,
    )  # fmt: skip
    param_groups = parameter_groups(module, config.train, trainable)
    optimizer = torch.optim.AdamW(param_groups, lr=LR, eps=config.train.eps) if param_groups else None
    stage = Zero3Stage(
        module, optimizer, topology=topology, groups=groups, ds_config=ds_config, gathered_fraction=1.0,
        reduce_once=case.zero != "zero2", tied=module.tied_copy,
    )  # fmt: skip
    runner = Runner(
        stage, topology=topology, groups=groups, width=module.spec.width, dtype=torch.float32,
        schedule="interleaved" if case.virtual_stages > 1 else "1f1b", virtual_stages=virtual_stages,
    )  # fmt: skip
    seen: dict[str, Any] = {"before": _shards(stage), "loss": [], "norm": [], "reduced": []}
    for step in range(STEPS):
        everything = [micro_batch(step, index) for index in range(2)]
        count = len(everything) // topology.dp
        own = everything[topology.dp_rank * count :][:count]
        own = own if topology.first else [replace(inputs, pixels=None) for inputs in own]
        losses = runner.run(own, topology.dp / target_count(everything)).sum()
        dist.all_reduce(losses)
        seen["loss"].append(float(losses) / target_count(everything))
        seen["norm"].append(stage.step(LR).grad_norm)
        seen["reduced"].append(asdict(stage.traffic.take())["reduced"])
    trained = {name for name, _ in stage.trainable()}
    states = sum(state.numel() for group in (optimizer.state.values() if optimizer else ()) for state in group.values())
    return seen | {"after": _shards(stage), "trained": trained, "states": states, "steps": stage.optimizer_steps}


def _shards(stage: Zero3Stage) -> dict[str, torch.Tensor]:
    return {name: stage.compute_shard(param).clone() for name, param in stage.module.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    fill_rank_variables()
    start_processes(60)
    grids = {pp: Topology(RANKS, dist.get_rank(), pp) for pp in (1, 2)}
    groups = {pp: create_groups(topology, ring=pp > 1) for pp, topology in grids.items()}
    for case in dict.fromkeys([*CASES, *(case.whole for case in CASES)]):
        number_from_zero()
        del parameter_offload.FWD_MODULE_STACK[:]
        torch.save(train(case, grids[case.pp], groups[case.pp]), out / f"{case}-{dist.get_rank()}.pt")
    stop_processes()


if __name__ == "__main__":
    main()
