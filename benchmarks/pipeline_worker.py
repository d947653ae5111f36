"""One rank of `benchmarks.pipeline`: runs every case in turn on fresh engines and writes the results.

All cases train the same causal text decoder on rows of the same tokens, so that DeepSpeed's own engines can run it too.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn
from torch.nn import functional as F

from pipeline.attention import AttentionPlan, build_plan
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.masks import Sidecars
from pipeline.model.build import build_stage
from pipeline.model.inputs import StageInputs
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from pipeline.parallel.groups import create_groups
from pipeline.parallel.launch import fill_rank_variables, start_processes, stop_processes
from pipeline.parallel.partition import joined, split_stages
from pipeline.parallel.runner import Runner
from pipeline.parallel.topology import Topology
from pipeline.parallel.traffic import StepTraffic, Traffic
from pipeline.parallel.zero3 import Zero3Stage, _count_collectives, sharder
from pipeline.training.engine import parameter_groups

LAYERS, WIDTH, VOCAB, TOKENS = 8, 128, 1024, 256
WARM_UP = 2
"""Warm-up steps: DeepSpeed records its trace in the first and follows it from the second on."""
STOCK_LIMITS = {
    "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
}  # fmt: skip
"""DeepSpeed's default, in elements."""
MODEL = {
    "llm": {
        "config": {
            "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 344, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": TOKENS,
        }
    },
    "vision": {
        "config": {
            "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": 8, "patch_size": 8,
        }
    },
    "connector": {"latents": 1, "depth": 1, "heads": 1, "head_dim": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One engine and its settings."""

    engine: Literal["stages", "ZeRO-3", "PipelineModule"]
    """This project's; the stock engine with its own accumulation; DeepSpeed's own pipeline with ZeRO-1."""
    pp: int
    microbatches: int
    zero: int = 3
    gathered_fraction: float = 1.0
    once: bool | None = None


def all_cases(counts: Sequence[int], quick: bool) -> list[Case]:
    """Return the cases of each number of micro-batches: baselines first, then every setting.

    On 4 stages each stage has one data-parallel rank, which shards nothing: all its settings are equivalent.
    """
    shares, onces = ((0.0, 1.0), (True,)) if quick else ((0.0, 0.5, 1.0), (True, False))
    cases = []
    for microbatches in counts:
        cases.append(Case("ZeRO-3", 1, microbatches))
        cases += [Case("PipelineModule", pp, microbatches, zero=1) for pp in ((2,) if quick else (2, 4))]
        for pp in (1, 2):
            cases += [Case("stages", pp, microbatches, zero=zero) for zero in (1, 2)]
            cases += [
                Case("stages", pp, microbatches, 3, share, once) for share, once in itertools.product(shares, onces)
            ]
        cases += [] if quick else [Case("stages", 4, microbatches)]
    return cases


def row(seed: int, plan: AttentionPlan) -> StageInputs:
    """Draw one row of text in which every token is a target."""
    ids = torch.randint(VOCAB, (TOKENS + 1,), generator=torch.Generator().manual_seed(seed))
    nothing = torch.empty(0, dtype=torch.long)
    return StageInputs(ids[:-1], torch.arange(TOKENS), plan, ids[1:], nothing, None)


def text_plan() -> AttentionPlan:
    ones, zeros = torch.ones(TOKENS, dtype=torch.long), torch.zeros(TOKENS, dtype=torch.long)
    return build_plan("causal", Sidecars(segment=ones, modality=zeros, instance=zeros - 1, generated=ones))


class Embed(nn.Module):
    """The embedding as the first layer of a PipelineModule."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.table = stage.model.embed_tokens

    def forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        return self.table(ids_1T)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A decoder layer as a layer of a PipelineModule."""

    def __init__(self, stage: Stage, index: int, plan: AttentionPlan) -> None:
        super().__init__()
        self.layer = stage.model.layers[str(index)]
        self._fixed = (stage.rotary, plan)

    def forward(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        rotary, plan = self._fixed
        positions = torch.arange(hidden_1TD.shape[1])[None]
        return self.layer(  # type: ignore[no-any-return]
            hidden_1TD, attention_mask=plan, position_ids=positions, position_embeddings=rotary(hidden_1TD, positions)
        )


class Head(nn.Module):
    """Norm and head as the last layer of a PipelineModule; returns logits for its loss function."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.norm, self.head = stage.model.norm, stage.lm_head

    def forward(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(hidden_1TD), self.head.weight)


def mean_loss(logits_1TV: torch.Tensor, labels_1T: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_1TV.flatten(0, 1), labels_1T.flatten())


class Bench:
    """The model and the rows of all cases on this rank."""

    def __init__(self) -> None:
        self.spec = ModelSpec.resolve(ModelConfig.model_validate(MODEL), vocab_size=VOCAB, image_tokens=1)
        self.plan = text_plan()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.grids = {pp: Topology(self.world, self.rank, pp) for pp in (1, 2, 4)}
        self.groups = {pp: create_groups(grid) for pp, grid in self.grids.items()}

    def rows(self, case: Case) -> list[StageInputs]:
        """Return the rows of this data-parallel rank."""
        first = self.grids[case.pp].dp_rank * case.microbatches
        return [row(first + number, self.plan) for number in range(case.microbatches)]

    def whole_model(self) -> Stage:
        return build_stage(
            self.spec, layers=range(LAYERS), first=True, last=True, dtype=torch.float32, device="cpu", seed=0
        )

    def config(self, case: Case) -> tuple[dict[str, Any], Sharding]:
        keys = {"gathered_fraction": case.gathered_fraction, "reduce_once": case.once}
        run = RunConfig.model_validate({"log": {"tensorboard": False}, "parallel": keys})
        raw = read_ds_config(f"ds_configs/zero{case.zero}.json")
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return complete_ds_config(raw, run, microbatch_rows=1, bf16=False), Sharding.of(raw, run.parallel)

    def engine(
        self, case: Case, *, schedule: str = "1f1b", virtual_stages: int = 1
    ) -> tuple[Zero3Stage, Runner, nn.Module]:
        """Return this project's engine, its runner and its sharded module."""
        grid, groups, (ds_config, sharding) = self.grids[case.pp], self.groups[case.pp], self.config(case)
        own = split_stages(LAYERS, case.pp, virtual_stages)[grid.stage]
        module = build_stage(
            self.spec, layers=joined(own), first=grid.first, last=grid.last,
            dtype=torch.float32, device="cpu", seed=0, reads=grid.dp_rank == 0, shard=sharder(grid, groups, ds_config),
        )  # fmt: skip
        stage = Zero3Stage(
            module, adamw(module), topology=grid, groups=groups, ds_config=ds_config,
            gathered_fraction=sharding.gathered_fraction,
            reduce_once=sharding.reduce_once,
        )  # fmt: skip
        runner = Runner(
            stage, topology=grid, groups=groups, width=WIDTH, dtype=torch.float32, schedule=schedule,
            virtual_stages=own,
        )  # fmt: skip
        return stage, runner, module

    def stages(self, case: Case) -> tuple[Callable[[], Any], Traffic, tuple[int, int]]:
        """This project's engine."""
        stage, runner, module = self.engine(case)
        rows, scale = self.rows(case), 1 / (case.microbatches * TOKENS)

        def step() -> None:
            runner.run(rows, scale)
            stage.step(1e-4)

        return step, stage.traffic, sizes(module)

    def stock(self, case: Case) -> tuple[Callable[[], Any], Traffic, tuple[int, int]]:
        """DeepSpeed's ZeRO-3 without a pipeline: forward, backward and step per micro-batch."""
        module, traffic = self.whole_model(), Traffic()
        _count_collectives(traffic)
        zero = read_ds_config("ds_configs/zero3.json")["zero_optimization"]
        share = sum(param.numel() for param in module.parameters()) / 4e9  # limits that bind as on a model of 4B
        for key, default in STOCK_LIMITS.items():
            zero[key] = int(zero.get(key, default) * share)
        ds_config = {
            "zero_optimization": zero | {"stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": case.microbatches,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 60,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(module), config=ds_config)
        rows = self.rows(case)

        def step() -> None:
            for inputs in rows:
                engine.backward(engine(None, inputs) / TOKENS)
                engine.step()

        return step, traffic, sizes(engine.module)

    def pipeline_module(self, case: Case) -> tuple[Callable[[], Any], Traffic, tuple[int, int]]:
        """DeepSpeed's own pipeline, which supports ZeRO-1 at most."""
        whole, grid = self.whole_model(), self.grids[case.pp]
        layers = [Embed(whole), *(Layer(whole, index, self.plan) for index in range(LAYERS)), Head(whole)]
        places = PipeDataParallelTopology(num_pp=case.pp, num_dp=grid.dp)
        module = PipelineModule(layers=layers, topology=places, loss_fn=mean_loss, partition_method="parameters")
        ds_config = {
            "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0,
            "gradient_accumulation_steps": case.microbatches, "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }  # fmt: skip
        optimizer = torch.optim.AdamW([param for param in module.parameters() if param.requires_grad], lr=1e-4)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
        pairs = [(inputs.input_ids[None], inputs.labels[None]) for inputs in self.rows(case)]
        return (lambda: engine.train_batch(data_iter=iter(pairs))), Traffic(), (1, 0)

    def measure(self, case: Case, steps: int) -> dict[str, Any]:
        """Measure one case; times are of the fastest step on the slowest rank."""
        kinds = {"stages": self.stages, "ZeRO-3": self.stock, "PipelineModule": self.pipeline_module}
        step, traffic, (trained, frozen) = kinds[case.engine](case)
        for _ in range(WARM_UP):
            step()
        traffic.take()
        walls, process = [], time.process_time()
        for seconds in timed(step, steps):
            walls.append(seconds)
        worked = torch.tensor([time.process_time() - process])
        dist.all_reduce(worked)
        counted = traffic.take()
        moved = StepTraffic.of(counted, trained=trained, frozen=frozen, size=4)
        sent = torch.tensor([float(counted.sent)])
        dist.all_reduce(sent)
        return asdict(case) | {
            "seconds": min(walls), "cpu_seconds": float(worked) / steps,
            "tokens": case.microbatches * TOKENS * self.grids[case.pp].dp,
            "gather_x": moved.gather_x / steps, "reduce_x": moved.reduce_x / steps,
            "gathers": counted.gathers / steps, "reductions": counted.reductions / steps,
            "sent_bytes": float(sent) / steps,
        }  # fmt: skip


def timed(step: Callable[[], Any], steps: int) -> Iterator[float]:
    """Yield the seconds of each step on the slowest rank."""
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        step()
        seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        yield float(seconds)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    section = RunConfig().train
    trained = [param for param in module.parameters() if param.requires_grad]
    groups = parameter_groups(module, section) if hasattr(trained[0], "ds_shape") else [{"params": trained}]
    return torch.optim.AdamW(groups, lr=section.lr)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (trained, frozen) elements of a sharded module."""
    params: list[Any] = list(module.parameters())
    trained = sum(param.ds_numel for param in params if param.requires_grad)
    return trained, sum(param.ds_numel for param in params) - trained


def main() -> None:
    """Measure every case; rank 0 writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--micro-batches", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    fill_rank_variables()
    start_processes(600)
    gc.freeze()  # DeepSpeed collects garbage for every engine: all that was imported is looked through only once
    bench, results = Bench(), []
    for case in all_cases(options.micro_batches, options.quick):
        results.append(bench.measure(case, options.steps))
        gc.collect()
        if bench.rank == 0:  # after every case: a run that ends early keeps what it has
            options.out.write_text(json.dumps(results), encoding="utf-8")
            print(json.dumps(results[-1]), flush=True)
    stop_processes()


if __name__ == "__main__":
    main()
