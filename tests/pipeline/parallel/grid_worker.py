"""One rank of the grid tests: takes three clipped AdamW steps per case, on engines made anew, and saves what it saw.

Every case trains the same global micro-batches, so all of them share one reference that knows no ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3, utils
from pytest import MonkeyPatch

from pipeline.config import RunConfig, TrainSection
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.parallel import zero3
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from pipeline.parallel.groups import Groups, create_groups, fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.partition import split_stages
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage, sharder
from pipeline.training.trainer import parameter_groups
from tests.pipeline.model.helpers import random_sidecars, stage_inputs, tiny_spec

RANKS, LAYERS = 4, 4
MICROS = (4, 8, 4)
"""Micro-batches of each step over all replicas: their number on a rank varies."""
LR = 1e-3
# Adam divides a gradient by its own size: with the usual eps, entries near zero would turn rounding into full steps.
TRAIN = TrainSection(lr=LR, clip_norm=0.1, weight_decay=0.1, eps=1e-5)
POISONED_STEP, POISONED_RANK = 1, 3


@dataclass(frozen=True)
class Case:
    """One shape of the grid and one way to run it."""

    pp: int
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    checkpointing: bool = False
    tied: bool = False
    resident: float = 1.0
    reduce_once: bool | None = None
    config: str = "zero3"
    """File of ds_configs."""
    leaves: bool = False
    """Layers are gathered as one."""
    evaluate: bool = False
    """Run a forward without gradients before every step."""
    persist: int = 0
    """Parameters of at most so many elements stay gathered between steps."""
    without: Literal["", "backward flag", "global norm", "one accumulation", "release"] = ""
    """A correction of `zero3` that is undone."""
    poison: bool = False
    """One gradient on one rank of one stage is not a number in one step."""
    layers: int = LAYERS
    micros: tuple[int, ...] = MICROS
    chunks: int = 1


CASES: Mapping[str, Case] = {
    "pp2": Case(2),
    "pp2-gpipe": Case(2, "gpipe"),
    "pp2-checkpointing-evaluate": Case(2, checkpointing=True, evaluate=True),
    "pp2-persistent": Case(2, resident=0.0, persist=10_000),
    "pp4-checkpointing": Case(4, checkpointing=True),
    "pp4-gpipe-evaluate": Case(4, "gpipe", evaluate=True),
    "pp1": Case(1),
    "pp1-checkpointing-evaluate": Case(1, checkpointing=True, evaluate=True),
    "pp1-true-zero3": Case(1, "gpipe", resident=0.0, reduce_once=False),
    "tied-pp1": Case(1, tied=True),
    "tied-pp2-gpipe": Case(2, "gpipe", tied=True),
    "tied-pp2-true-zero3": Case(2, tied=True, resident=0.0, reduce_once=False),
    "tied-pp4-checkpointing": Case(4, checkpointing=True, tied=True),
    "pp2-resident0-once": Case(2, resident=0.0),
    "pp2-resident0-gpipe-checkpointing": Case(2, "gpipe", True, resident=0.0, reduce_once=False, evaluate=True),
    "pp2-resident0.5-once": Case(2, "gpipe", resident=0.5),
    "pp2-resident0.5": Case(2, resident=0.5, reduce_once=False),
    "pp2-resident1": Case(2, "gpipe", checkpointing=True, reduce_once=False),
    "pp4-resident0.5": Case(4, resident=0.5, reduce_once=False),
    "pp2-interleaved-checkpointing-evaluate": Case(2, "interleaved", checkpointing=True, evaluate=True, chunks=2),
    "pp2-interleaved-odd": Case(2, "interleaved", chunks=2, micros=(6, 10, 2)),
    "pp4-interleaved-resident0": Case(4, "interleaved", resident=0.0, reduce_once=False, layers=8, chunks=2),
    "tied-pp2-interleaved-resident0": Case(2, "interleaved", tied=True, resident=0.0, chunks=2),
    "tied-pp4-interleaved-odd": Case(4, "interleaved", True, tied=True, layers=8, chunks=2, micros=(6, 9, 7)),
    "pp1-zero1": Case(1, config="zero1"),
    "pp2-zero2-gpipe-checkpointing": Case(2, "gpipe", True, config="zero2"),
    "tied-pp2-zero1-evaluate": Case(2, config="zero1", tied=True, evaluate=True),
    "pp1-leaves": Case(1, leaves=True),
    "pp2-leaves-resident0": Case(2, "gpipe", True, resident=0.0, reduce_once=False, leaves=True, evaluate=True),
    "tied-pp2-offload": Case(2, config="zero3_offload", tied=True),
    "tied-pp2-offload-all": Case(2, config="zero3_offload_params", tied=True, resident=0.0, reduce_once=False),
}
BROKEN: Mapping[str, Case] = {
    "backward-flag": Case(2, "gpipe", reduce_once=False, without="backward flag"),
    "global-norm": Case(2, without="global norm"),
    "one-accumulation": Case(2, without="one accumulation"),
    "release": Case(2, resident=0.0, reduce_once=False, layers=24, micros=(16, 16), without="release"),
    "global-norm-poisoned": Case(2, without="global norm", poison=True),
}
POISONED: Mapping[str, Case] = {
    "poisoned": Case(2, poison=True),
    "poisoned-resident0": Case(2, "gpipe", resident=0.0, reduce_once=False, poison=True),
}
TRAFFIC: Mapping[str, Case] = {
    f"traffic-{resident:g}-{'once' if once else 'each'}": Case(
        2, resident=resident, reduce_once=once, layers=24, micros=(16, 16)
    )
    for resident, once in ((1.0, True), (1.0, False), (0.0, False))
} | {
    "traffic-leaves": Case(2, resident=0.0, reduce_once=False, layers=24, micros=(16, 16), leaves=True),
    "traffic-zero1": Case(2, config="zero1", micros=(16, 16)),
    "traffic-zero2": Case(2, config="zero2", micros=(16, 16)),
}


def grid_spec(tied: bool, layers: int = LAYERS) -> ModelSpec:
    return tiny_spec(num_hidden_layers=layers, tie_word_embeddings=tied, initializer_range=0.05)


def micro_batch(step: int, index: int) -> StageInputs:
    """One of a step's global micro-batches: with images, without, or with images and nothing to learn."""
    seed = 100 * step + index
    kind = ("images", "text", "unsupervised", "images")[(step + index) % 4]
    sidecars = random_sidecars(seed, 2 + index % 2, padding=index % 3, text_only=kind == "text")
    inputs = stage_inputs(sidecars, seed=seed, dtype=torch.float32)
    return replace(inputs, labels=torch.full_like(inputs.labels, IGNORE)) if kind == "unsupervised" else inputs


def target_count(micros: Sequence[StageInputs]) -> int:
    return sum(int((inputs.labels != IGNORE).sum()) for inputs in micros)


class Job:
    """One case on this rank."""

    def __init__(self, case: Case, topology: Topology, groups: Groups) -> None:
        self.case, self.topology, self.groups = case, topology, groups
        self.spec = grid_spec(case.tied, case.layers)
        config = RunConfig.model_validate(
            {"train": TRAIN, "parallel": {"resident": case.resident, "reduce_once": case.reduce_once}}
        )
        config = config.model_copy(update={"log": config.log.model_copy(update={"tensorboard": False})})
        raw = read_ds_config(f"ds_configs/{case.config}.json")
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = case.persist
        sharding = Sharding.of(raw, config.parallel)
        ds_config = complete_ds_config(raw, config, micro_packs=1, bf16=False)
        if case.without == "one accumulation":
            ds_config["gradient_accumulation_steps"] = case.micros[0] // topology.dp
        chunks = split_stages(case.layers, topology.pp, case.chunks)[topology.stage]
        module = build_stage(
            self.spec, layers=[layer for chunk in chunks for layer in chunk], first=topology.first,
            last=topology.last, dtype=torch.float32, device="cpu", seed=3, reads=topology.replica == 0,
            shard=sharder(topology, groups, ds_config), gradient_checkpointing=case.checkpointing,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(parameter_groups(module, TRAIN), lr=LR, eps=TRAIN.eps)
        with MonkeyPatch.context() as patch:
            if case.without == "release":
                patch.setattr(zero3, "_release_each_call", lambda offload, root: None)
            self.stage = Zero3Stage(
                module, optimizer, topology=topology, groups=groups, ds_config=ds_config, resident=sharding.resident,
                reduce_once=sharding.reduce_once, tied=module.tied_copy, leaves=module.blocks() if case.leaves else (),
            )  # fmt: skip
        self.runner = Runner(
            self.stage, topology=topology, groups=groups, width=self.spec.width, dtype=torch.float32,
            schedule=case.schedule, chunks=chunks,
        )  # fmt: skip
        self.chunks = chunks
        if case.without:
            UNDO[case.without](self.stage)

    def micros(self, step: int) -> tuple[list[StageInputs], float]:
        """Return this rank's micro-batches and what its token losses are scaled by."""
        everything = [micro_batch(step, index) for index in range(self.case.micros[step])]
        count = self.case.micros[step] // self.topology.dp
        own = everything[self.topology.replica * count :][:count]
        if not self.topology.first:
            own = [replace(inputs, pixels=None) for inputs in own]
        return own, self.topology.dp / target_count(everything)

    def train(self) -> dict[str, Any]:
        """Take all steps; return this rank's losses, norms, gradient shards of every step and last weights."""
        seen: dict[str, Any] = {"loss": [], "norm": [], "applied": [], "gradients": [], "weights": []}
        seen |= {"traffic": [], "traffic of update": [], "whole": [], "peak": [], "parameters": self.parameters()}
        peak = GatheredPeak(self.stage)
        for step in range(len(self.case.micros)):
            micros, scale = self.micros(step)
            if self.case.evaluate:
                self.evaluate(micros[0])
            seen["loss"].append(float(self.runner.run(micros, scale).sum()))
            if self.case.poison and (step, self.topology.rank) == (POISONED_STEP, POISONED_RANK):
                next(grad for _, grad in self.gradients())[0] = torch.nan
            seen["gradients"].append({name: grad.clone() for name, grad in self.gradients()})
            if self.case.without == "backward flag":  # what is left of the lost gradients makes DeepSpeed's step raise
                return seen
            seen["traffic"].append(asdict(self.stage.traffic.take()))
            seen["peak"].append(peak.take())
            result = self.stage.step(LR)
            seen["traffic of update"].append(asdict(self.stage.traffic.take()))  # parameters kept whole
            seen["whole"].append(whole_share(self.stage))
            seen["norm"].append(result.grad_norm)
            seen["applied"].append(result.applied)
            seen["weights"].append(
                {name: self.stage.master_shard(param).clone() for name, param in self.stage.trainable()}
            )
        return seen

    def parameters(self) -> tuple[int, int]:
        """Return (trained, frozen) elements of the stage."""
        trained = sum(Zero3Stage.full_shape(param).numel() for _, param in self.stage.trainable())
        return trained, sum(Zero3Stage.full_shape(param).numel() for _, param in self.stage.frozen())

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, self.stage.gradient_shard(param)) for name, param in self.stage.trainable()]

    @torch.no_grad()
    def evaluate(self, inputs: StageInputs) -> None:
        """Pass one micro-batch through all stages without gradients, as a validation loss would."""
        stage, stages = self.topology.stage, self.topology.pp
        for index, chunk in enumerate(self.chunks):
            hidden = None
            if index or stage:
                before = (stage - 1) % stages
                hidden = torch.empty(1, inputs.input_ids.numel(), self.spec.width)
                source = self.topology.rank_of(before, self.topology.replica)
                dist.recv(hidden, source, group=self.groups.links[before, stage])
            output = self.stage.forward(hidden, inputs, chunk)
            if index + 1 < len(self.chunks) or stage + 1 < stages:
                after = (stage + 1) % stages
                target = self.topology.rank_of(after, self.topology.replica)
                dist.send(output.contiguous(), target, group=self.groups.links[stage, after])


def whole_share(stage: Zero3Stage) -> float:
    """Share of a stage's parameters that is whole at this moment."""
    params: list[Any] = list(stage.module.parameters())
    whole = sum(param.ds_numel for param in params if param.ds_status.name != "NOT_AVAILABLE")
    return float(whole / sum(param.ds_numel for param in params))


class GatheredPeak:
    """Largest share of a stage's parameters that is whole at once, looked at whenever more is gathered."""

    def __init__(self, stage: Zero3Stage) -> None:
        gather = partition_parameters._dist_allgather_fn
        self._most = 0.0

        def looked(*args: Any) -> Any:
            self._most = max(self._most, whole_share(stage))
            return gather(*args)

        partition_parameters._dist_allgather_fn = looked

    def take(self) -> float:
        most, self._most = self._most, 0.0
        return most


def _keep_backward_flag(stage: Zero3Stage) -> None:
    stage._zero.clear_backward_seen_flag = lambda: None


def _restore_own_norm(stage: Zero3Stage) -> None:
    del stage._zero._get_norm_groups  # an attribute of the instance covers DeepSpeed's own method


UNDO: Mapping[str, Callable[[Zero3Stage], None]] = {
    "backward flag": _keep_backward_flag,
    "global norm": _restore_own_norm,
    "one accumulation": lambda stage: None,  # undone in the configuration, before the engine is made
    "release": lambda stage: None,  # undone before the engine is made, too
}


def compare_orders_over_the_world() -> None:
    """Undo correction 1: DeepSpeed's own comparison, in every module that imported it."""
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = utils.assert_ints_same_as_other_ranks


def number_from_zero() -> None:
    """Give the next engine the numbers of a fresh process: DeepSpeed counts modules and parameters per process, and
    ranks that held other stages before would otherwise number the same module differently."""
    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def run_table(out: Path) -> None:
    grids = {pp: Topology(RANKS, dist.get_rank(), pp) for pp in (1, 2, 4)}
    groups = {pp: create_groups(topology) for pp, topology in grids.items()}
    for name, case in (CASES | BROKEN | POISONED | TRAFFIC).items():
        number_from_zero()
        seen = Job(case, grids[case.pp], groups[case.pp]).train()
        torch.save(seen, out / f"{name}-{dist.get_rank()}.pt")


def run_without_group_order() -> None:
    topology = Topology(RANKS, dist.get_rank(), 2)
    job = Job(Case(2), topology, create_groups(topology, timeout_s=20))
    compare_orders_over_the_world()
    job.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("out", type=Path, nargs="?")
    out = parser.parse_args().out
    fill_rank_variables()
    start_processes(60 if out else 20)
    if out:
        run_table(out)
    else:
        run_without_group_order()
    stop_processes()


if __name__ == "__main__":
    main()
