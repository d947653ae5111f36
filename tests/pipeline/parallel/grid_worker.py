"""One rank of the grid tests: takes three clipped AdamW steps per case, on new engines, and saves what it saw.

Every case trains the same global micro-batches, so all of them share one reference that knows no ranks.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3, utils
from pytest import MonkeyPatch

from data_prep.media.spec import MediaSpec, NativeImages
from pipeline.config.schema import ModelConfig, RunConfig, TrainSection
from pipeline.masks import Sidecars
from pipeline.model.build import build_stage
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.patches import PatchLayout
from pipeline.model.preprocess import Preprocess
from pipeline.model.spec import ModelSpec
from pipeline.parallel import zero3
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from pipeline.parallel.groups import Groups, create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.partition import joined, split_stages
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.zero3 import Zero3Stage, sharder
from pipeline.training.engine import parameter_groups
from tests.pipeline.model.connectors import SECOND, TINY
from tests.pipeline.model.helpers import NAFLEX, VOCAB, model_config, random_sidecars, stage_inputs

RANKS = 4
MICROS, EIGHT, DEEP = (4, 8, 4), (4, 16, 4), 24
"""Micro-batches of each step over all dp ranks: their number on a rank varies, and is 8 of two dp ranks in `EIGHT`."""
LR = 1e-3
# Adam divides a gradient by its own size: with the usual eps, entries near zero would turn rounding into full steps.
TRAIN = TrainSection(lr=LR, clip_norm=0.1, weight_decay=0.1, eps=1e-5)
POISONED_RANK = 3
NATIVE = MediaSpec(image=NativeImages(kind="native", patch_px=8, merge=2, max_tokens=6))


@dataclass(frozen=True)
class Case:
    """One shape of the grid and one way to run it."""

    pp: int
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    checkpointing: int = 0
    """k: every k-th layer is recomputed; 0 = none."""
    tied: bool = False
    gathered_fraction: float = 1.0
    reduce_once: bool = True
    config: str = "zero3"
    """File of ds_configs."""
    leaves: bool = False
    """Layers are gathered as one."""
    overlapped: bool = False
    """Weights are gathered during the first forwards, as on GPUs."""
    evaluate: bool = False
    """Run a forward without gradients before every step."""
    persist: int = 0
    """Parameters of at most so many elements stay gathered between steps."""
    microbatches: tuple[int, ...] = MICROS
    without: Literal["", "backward flag", "global norm", "one accumulation", "release", "cut stack"] = ""
    """A correction of `zero3` that is undone."""
    poisoned: int | None = None
    """In this step one gradient on one rank of one stage is not a number."""
    deep: bool = False
    """A layer is a small share of a stage."""
    bf16: bool = False
    """Train in bf16, and reduce in fp32."""
    connector: str = "perceiver"
    """Kind of connector; sva reads two towers; native: images of their own sizes."""

    @property
    def virtual_stages(self) -> int:
        return 2 if self.schedule == "interleaved" else 1

    @property
    def layers(self) -> int:
        return DEEP if self.deep else max(4, self.pp * self.virtual_stages)

    def __str__(self) -> str:
        said = {
            "tied": self.tied, f"pp{self.pp}": True, self.schedule: True, "checkpointing": self.checkpointing > 0,
            self.config: True, f"gathered{self.gathered_fraction:g}": self.gathered_fraction < 1,
            "each": not self.reduce_once,
            "leaves": self.leaves, "overlapped": self.overlapped, "evaluate": self.evaluate, "persistent": self.persist,
            "x".join(map(str, self.microbatches)): self.microbatches != MICROS, f"without {self.without}": self.without,
            "poisoned": self.poisoned is not None, "deep": self.deep, "bf16": self.bf16,
            self.connector: self.connector != "perceiver",
        }  # fmt: skip
        return "-".join(word for word, so in said.items() if so)


ONCE, EACH = (
    Case(2, microbatches=EIGHT),
    Case(2, "gpipe", 1, reduce_once=False, overlapped=True, microbatches=EIGHT),
)
ALONE = Case(4, "gpipe")
"""Each rank is alone in its stage, so nothing is summed over ranks."""
ZERO1 = Case(2, tied=True, config="zero1", microbatches=EIGHT)
ZERO2 = Case(2, "gpipe", reduce_once=False, config="zero2", microbatches=EIGHT)
PERSIST, ODD = 1_200, {2: (6, 10, 2), 4: (6, 9, 7)}
# Any two settings that go together meet in some case; `test_grid` counts.
EQUAL = [
    ONCE,
    EACH,
    ZERO1,
    ZERO2,
    Case(1, checkpointing=1, evaluate=True),
    Case(1, "gpipe", 1, config="zero1", leaves=True, overlapped=True, evaluate=True),
    Case(1, "gpipe", tied=True, reduce_once=False, config="zero2", evaluate=True),
    Case(1, tied=True, gathered_fraction=0.0, reduce_once=False, config="zero3_offload", persist=PERSIST),
    Case(1, "gpipe", gathered_fraction=0.5, config="zero3_offload_params", leaves=True),
    Case(2, tied=True, gathered_fraction=0.0, reduce_once=False),
    Case(
        2, "interleaved", gathered_fraction=0.5, reduce_once=False, config="zero3_offload", leaves=True,
        microbatches=ODD[2],
    ),
    Case(
        2, "interleaved", tied=True, gathered_fraction=0.0, leaves=True, evaluate=True, persist=PERSIST,
        microbatches=ODD[2],
    ),
    Case(
        2, "interleaved", tied=True, reduce_once=False, config="zero3_offload_params", leaves=True, overlapped=True,
        evaluate=True, microbatches=ODD[2],
    ),
    Case(2, "interleaved", 1, reduce_once=False, config="zero2", leaves=True, microbatches=ODD[2]),
    Case(2, "interleaved", 1, tied=True, gathered_fraction=0.5, config="zero3_offload_params", microbatches=ODD[2]),
    Case(2, "interleaved", 2, tied=True, reduce_once=False, config="zero3_offload", overlapped=True),
    Case(4, gathered_fraction=0.5, reduce_once=False, evaluate=True),
    ALONE,
    Case(4, reduce_once=False, config="zero2", leaves=True, overlapped=True, microbatches=ODD[4]),
    Case(
        4, checkpointing=1, gathered_fraction=0.0, reduce_once=False, config="zero3_offload_params", persist=PERSIST
    ),
    Case(
        4, "gpipe", tied=True, gathered_fraction=0.0, config="zero3_offload", leaves=True, evaluate=True,
        persist=PERSIST,
        microbatches=ODD[4],
    ),
    Case(4, "interleaved", tied=True, config="zero1", leaves=True, microbatches=ODD[4]),
]  # fmt: skip
NO_FLAG = Case(2, "gpipe", reduce_once=False, microbatches=(4,), without="backward flag")
NO_NORM = Case(2, without="global norm", poisoned=2)
ACCUMULATED = Case(2, microbatches=(4,), without="one accumulation")
UNRELEASED = Case(2, gathered_fraction=0.0, reduce_once=False, microbatches=(4, 8), without="release")
UNCUT = Case(2, checkpointing=1, gathered_fraction=0.0, microbatches=(4, 4), without="cut stack")
BROKEN = [NO_FLAG, NO_NORM, ACCUMULATED, UNRELEASED, UNCUT]
POISONED = [Case(2, poisoned=1), Case(2, "gpipe", gathered_fraction=0.0, reduce_once=False, poisoned=1)]
RELEASED = Case(2, gathered_fraction=0.0, reduce_once=False, deep=True, microbatches=(16, 16))
LEAVES = replace(RELEASED, leaves=True)
BF16 = [
    Case(2, "interleaved", 1, tied=True, leaves=True, microbatches=(16,), bf16=True),
    Case(2, config="zero3_offload", gathered_fraction=0.0, reduce_once=False, microbatches=(16,), bf16=True),
]
CONNECTED = [
    Case(2, gathered_fraction=0.0, reduce_once=False, microbatches=(4, 4), connector=kind)
    for kind in ("mlp", "cabstractor", "dabstractor", "pixel_shuffle", "attention_pool", "sva", "native")
]
ALL = [*EQUAL, *BROKEN, *POISONED, RELEASED, LEAVES, *BF16, *CONNECTED]


@cache
def grid_spec(tied: bool, layers: int, connector: str = "perceiver") -> ModelSpec:
    llm = {"num_hidden_layers": layers, "tie_word_embeddings": tied, "initializer_range": 0.05}
    raw = model_config(**llm).model_dump()  # type: ignore[arg-type]
    raw["vision"]["config"]["num_hidden_layers"] = 1
    raw["connector"] |= {"depth": 1}
    if connector == "native":
        raw["vision"]["config"] = {**NAFLEX, "num_hidden_layers": 1}
        raw["connector"] = {"kind": "pixel_shuffle"}
    elif connector != "perceiver":
        raw["connector"] = {"kind": connector, **TINY[connector]}
        raw["extra_vision"] = [{"config": SECOND}] if connector == "sva" else []
    media = NATIVE if connector == "native" else None
    return ModelSpec.resolve(ModelConfig.model_validate(raw), vocab_size=VOCAB, image_tokens=None, media=media)


def micro_batch(step: int, index: int, connector: str = "perceiver", *, as_bytes: bool = False) -> StageInputs:
    """One of a step's global micro-batches: chats with images, without, or with nothing to learn, or captions.

    Pixels are bytes, as the loader hands them over, or the plain way: normalised before they reach the stage.
    """
    seed = 100 * step + index
    image_tokens = 6 if connector == "native" else grid_spec(False, 4, connector).image_tokens
    kind = ("chats", "text", "unsupervised", "captions")[(step + index) % 4]
    if kind == "captions":
        sidecars = captions(seed, 3, padding=index % 3, image_tokens=image_tokens)
    else:
        text_only = kind == "text"
        sidecars = random_sidecars(
            seed, 2 + index % 2, padding=index % 3, text_only=text_only, image_tokens=image_tokens
        )
    inputs = stage_inputs(sidecars, seed=seed, dtype=torch.float32)
    if inputs.pixels is not None:
        pixels = (inputs.pixels * 64 + 128).clamp(0, 255).to(torch.uint8)
        towers = [tower.preprocess for tower in grid_spec(False, 4, connector).towers.values()]
        first, *more = (F.interpolate(pixels, tower.size_px) for tower in towers)
        if not as_bytes:
            first, *more = map(normalized, (first, *more), towers)
        inputs = replace(inputs, pixels=first, extra_pixels=tuple(more))
    if connector == "native" and inputs.pixels is not None:
        grids = [((4, 6), (6, 4), (2, 12))[number % 3] for number in range(len(inputs.pixels))]
        patches = torch.randn(24 * len(grids), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        inputs = replace(inputs, pixels=patches, layout=PatchLayout.of(grids, 2))
    return replace(inputs, labels=torch.full_like(inputs.labels, IGNORE)) if kind == "unsupervised" else inputs


def normalized(pixels: torch.Tensor, tower: Preprocess) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return (pixels.float() / 255 - mean) / std


def in_bf16(inputs: StageInputs) -> StageInputs:
    return inputs if inputs.pixels is None else replace(inputs, pixels=inputs.pixels.bfloat16())


def captions(seed: int, samples: int, *, padding: int, image_tokens: int) -> Sidecars:
    """Draw a row of pre-training: every sample an image and its caption."""
    rng = random.Random(seed)
    segment: list[int] = []
    instance: list[int] = []
    for sample in range(samples):
        words = rng.randint(1, 6)
        segment += [sample + 1] * (image_tokens + words)
        instance += [sample] * image_tokens + [-1] * words
    seg, inst = (torch.tensor(own + [fill] * padding) for own, fill in ((segment, 0), (instance, -1)))
    return Sidecars(segment=seg, modality=(inst >= 0).long(), instance=inst, generated=((seg > 0) & (inst < 0)).long())


def target_count(microbatches: Sequence[StageInputs]) -> int:
    return sum(int((inputs.labels != IGNORE).sum()) for inputs in microbatches)


class Job:
    """One case on this rank."""

    def __init__(self, case: Case, topology: Topology, groups: Groups) -> None:
        self.case, self.topology, self.groups = case, topology, groups
        self.spec = grid_spec(case.tied, case.layers, case.connector)
        parallel = {"gathered_fraction": case.gathered_fraction, "reduce_once": case.reduce_once}
        config = RunConfig.model_validate({"train": TRAIN, "parallel": parallel})
        config = config.model_copy(update={"log": config.log.model_copy(update={"tensorboard": False})})
        raw = read_ds_config(f"ds_configs/{case.config}.json")
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = case.persist
        sharding = Sharding.of(raw, config.parallel)
        ds_config = complete_ds_config(raw, config, microbatch_rows=1, bf16=case.bf16)
        if case.bf16:
            ds_config["communication_data_type"] = "fp32"
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        if case.without == "one accumulation":
            ds_config["gradient_accumulation_steps"] = case.microbatches[0] // topology.dp
        virtual_stages = split_stages(case.layers, topology.pp, case.virtual_stages)[topology.stage]
        module = build_stage(
            self.spec, layers=joined(virtual_stages), first=topology.first,
            last=topology.last, dtype=dtype, device="cpu", seed=3, reads=topology.dp_rank == 0,
            shard=sharder(topology, groups, ds_config), gradient_checkpointing=case.checkpointing,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(parameter_groups(module, TRAIN), lr=LR, eps=TRAIN.eps)
        with MonkeyPatch.context() as patch:
            if case.without == "release":
                patch.setattr(zero3, "_release_each_call", lambda offload, root: None)
            self.stage = Zero3Stage(
                module, optimizer, topology=topology, groups=groups, ds_config=ds_config,
                gathered_fraction=sharding.gathered_fraction,
                reduce_once=sharding.reduce_once, tied=module.tied_copy, leaves=module.blocks() if case.leaves else (),
                gather_first=not case.overlapped,
            )  # fmt: skip
        self.runner = Runner(
            self.stage, topology=topology, groups=groups, width=self.spec.width, dtype=dtype,
            schedule=case.schedule, virtual_stages=virtual_stages,
        )  # fmt: skip
        self.virtual_stages = virtual_stages
        if case.without:
            UNDO[case.without](self.stage)

    def microbatches(self, step: int) -> tuple[list[StageInputs], float]:
        """Return this rank's micro-batches and what its token losses are scaled by."""
        numbers, connector = range(self.case.microbatches[step]), self.case.connector
        everything = [micro_batch(step, index, connector, as_bytes=not self.case.bf16) for index in numbers]
        count = self.case.microbatches[step] // self.topology.dp
        own = everything[self.topology.dp_rank * count :][:count]
        if not self.topology.first:
            own = [replace(inputs, pixels=None, extra_pixels=()) for inputs in own]
        elif self.case.bf16:
            own = [in_bf16(inputs) for inputs in own]
        return own, self.topology.dp / target_count(everything)

    def train(self) -> dict[str, Any]:
        """Take all steps; return this rank's losses, norms, gradient shards of every step and last weights."""
        seen: dict[str, Any] = {"loss": [], "norm": [], "applied": [], "gradients": [], "weights": [], "stack": []}
        seen |= {"traffic": [], "traffic of update": [], "whole": [], "peak": [], "parameters": self.parameters()}
        peak = GatheredPeak(self.stage)
        if self.case.bf16:
            seen["one by one"] = [self.add_up_one_by_one()]
        for step in range(len(self.case.microbatches)):
            microbatches, scale = self.microbatches(step)
            if self.case.evaluate:
                self.evaluate(microbatches[0])
            seen["loss"].append(float(self.runner.run(microbatches, scale).sum()))
            if (step, self.topology.rank) == (self.case.poisoned, POISONED_RANK):
                next(grad for _, grad in self.gradients())[0] = torch.nan
            seen["gradients"].append({name: grad.clone() for name, grad in self.gradients()})
            if self.case.without == "backward flag":  # what is left of the lost gradients makes DeepSpeed's step raise
                return seen
            seen["traffic"].append(asdict(self.stage.traffic.take()))
            seen["peak"].append(peak.take())
            result = self.stage.step(LR)
            seen["traffic of update"].append(asdict(self.stage.traffic.take()))  # parameters kept whole
            seen["whole"].append(peak.now())
            seen["norm"].append(result.grad_norm)
            seen["applied"].append(result.applied)
            seen["stack"].append(len(parameter_offload.FWD_MODULE_STACK))
            seen["weights"].append(
                {name: self.stage.master_shard(param).clone() for name, param in self.stage.trainable()}
            )
        return seen

    def add_up_one_by_one(self) -> dict[str, torch.Tensor]:
        """Return the fp64 sums of the gradient shards of the first step's micro-batches, each run by itself."""
        microbatches, scale = self.microbatches(0)
        total: dict[str, torch.Tensor] = {}
        for inputs in microbatches:
            self.runner.run([inputs], scale)
            for name, grad in self.gradients():
                total[name] = total.get(name, 0) + grad.double()
        return total

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
        for index, virtual_stage in enumerate(self.virtual_stages):
            hidden = None
            if index or stage:
                before = (stage - 1) % stages
                hidden = torch.empty(1, inputs.input_ids.numel(), self.spec.width)
                source = self.topology.rank_of(before, self.topology.dp_rank)
                dist.recv(hidden, source, group=self.groups.p2p_groups[before, stage])
            output = self.stage.forward(hidden, inputs, virtual_stage)
            if index + 1 < len(self.virtual_stages) or stage + 1 < stages:
                after = (stage + 1) % stages
                target = self.topology.rank_of(after, self.topology.dp_rank)
                dist.send(output.contiguous(), target, group=self.groups.p2p_groups[stage, after])


class GatheredPeak:
    """Largest share of a stage's parameters that is whole at once, looked at whenever more is gathered."""

    def __init__(self, stage: Zero3Stage) -> None:
        gather = partition_parameters._dist_allgather_fn
        self._params: list[Any] = list(stage.module.parameters())
        self._all, self._most = sum(param.ds_numel for param in self._params), 0.0

        def looked(*args: Any) -> Any:
            self._most = max(self._most, self.now())
            return gather(*args)

        partition_parameters._dist_allgather_fn = looked

    def now(self) -> float:
        away = partition_parameters.ZeroParamStatus.NOT_AVAILABLE
        return float(sum(param.ds_numel for param in self._params if param.ds_status is not away) / self._all)

    def take(self) -> float:
        most, self._most = self._most, 0.0
        return most


def _keep_backward_flag(stage: Zero3Stage) -> None:
    stage._zero.clear_backward_seen_flag = lambda: None


def _restore_own_norm(stage: Zero3Stage) -> None:
    del stage._zero._get_norm_groups  # an attribute of the instance covers DeepSpeed's own method


def _keep_stack(stage: Zero3Stage) -> None:
    stage._running = sys.maxsize


UNDO: Mapping[str, Callable[[Zero3Stage], None]] = {
    "backward flag": _keep_backward_flag,
    "global norm": _restore_own_norm,
    "cut stack": _keep_stack,
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


def run_table(out: Path, cases: Sequence[Case]) -> None:
    grids = {pp: Topology(RANKS, dist.get_rank(), pp) for pp in (1, 2, 4)}
    groups = {pp: create_groups(topology) for pp, topology in grids.items()}
    for case in cases:
        number_from_zero()
        del parameter_offload.FWD_MODULE_STACK[:]
        seen = Job(case, grids[case.pp], groups[case.pp]).train()
        torch.save(seen, out / f"{case}-{dist.get_rank()}.pt")


def run_without_group_order() -> None:
    topology = Topology(RANKS, dist.get_rank(), 2)
    job = Job(Case(2, gathered_fraction=0.0), topology, create_groups(topology, timeout_s=20))
    compare_orders_over_the_world()
    job.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="part of a case's name")
    options = parser.parse_args()
    out = options.out
    fill_rank_variables()
    start_processes(60 if out else 20)
    if out:
        run_table(out, [case for case in ALL if options.only in str(case)])
    else:
        run_without_group_order()
    stop_processes()


if __name__ == "__main__":
    main()
