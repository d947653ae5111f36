"""The ZeRO-3 engine of this rank's stage, built from a run plan."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist

from pipeline.config.schema import TrainSection
from pipeline.model.build import build_stage
from pipeline.model.trainable import Trainable
from pipeline.model.weights import WeightSource
from pipeline.parallel.groups import Groups
from pipeline.parallel.partition import joined
from pipeline.parallel.zero3 import Zero3Stage, check_version, sharder
from pipeline.planning.capacity import recomputed_layers
from pipeline.planning.run_plan import RunPlan
from pipeline.watchdog.heartbeat import Heartbeat


def parameter_groups(
    stage: torch.nn.Module, config: TrainSection, trainable: Trainable | None = None
) -> list[dict[str, object]]:
    """Return AdamW's groups by learning rate and decay: matrices decay, vectors (norms, biases) do not.

    ``lr_scale`` of a group is its learning rate as a multiple of ``train.lr``.
    """
    groups: dict[tuple[float, bool], dict[str, object]] = {}
    trained = [(name, param) for name, param in stage.named_parameters() if param.requires_grad]
    scales = {name: trainable.scale(trainable.label(name)) if trainable else 1.0 for name, _ in trained}
    for scale, is_matrix in product(dict.fromkeys(scales.values()), (True, False)):
        own = [p for name, p in trained if scales[name] == scale and (len(Zero3Stage.full_shape(p)) > 1) == is_matrix]
        decay = config.weight_decay if is_matrix else 0.0
        groups[scale, is_matrix] = {"params": own, "weight_decay": decay, "lr_scale": scale}
    return [group for group in groups.values() if group["params"]]


def build_engine(
    plan: RunPlan,
    groups: Groups,
    device: torch.device,
    heartbeat: Heartbeat,
    *,
    source: WeightSource | None,
    empty: bool,
) -> Zero3Stage:
    """Build this rank's stage.

    ``source`` has its first weights, or base weights. Without it and with ``empty``, no weights are read or
    initialised: a checkpoint will fill the stage.
    """
    topology, config = plan.topology, plan.config
    share = sharder(topology, groups, plan.ds_config)

    def shard(module: torch.nn.Module) -> None:
        heartbeat.report("building the stage")  # for each module: large ones take minutes to read
        share(module)

    warning = check_version()
    if warning and topology.rank == 0:
        print(f"warning: {warning}", flush=True)
    every = recomputed_layers(plan)
    if config.train.gradient_checkpointing == "auto":
        every = _most_recomputed(every, device, groups)
        shown = {0: "no decoder layer", 1: "every decoder layer"}.get(every, f"one decoder layer in {every}")
        if topology.rank == 0:
            print(f"recomputing {shown}, by estimated memory", flush=True)
    module = build_stage(
        plan.spec, layers=joined(plan.virtual_stages),
        first=topology.first, last=topology.last, dtype=plan.dtype, device=device,
        seed=config.train.seed, source=source,
        reads=topology.dp_rank == 0 and not (empty and source is None), shard=shard, trains=plan.split.trainable.trains,
        gradient_checkpointing=every,
    )  # fmt: skip
    param_groups = parameter_groups(module, config.train, plan.split.trainable)
    optimizer = _adamw(param_groups, config.train, fused=device.type == "cuda") if param_groups else None
    return Zero3Stage(
        module, optimizer, topology=topology, groups=groups, ds_config=plan.ds_config,
        gathered_fraction=plan.sharding.gathered_fraction, reduce_once=plan.sharding.reduce_once,
        tied=module.tied_copy,
        leaves=module.blocks() if plan.leaf_layers else (), progress_callback=heartbeat.report,
    )  # fmt: skip


def _most_recomputed(every: int, device: torch.device, groups: Groups) -> int:
    """Return the setting of the stage's rank with the least memory: its ranks must run modules in the same order."""
    share = torch.tensor([1 / every if every else 0.0], dtype=torch.float64, device=device)
    dist.all_reduce(share, op=dist.ReduceOp.MAX, group=groups.data)
    return round(1 / float(share)) if share else 0


def _adamw(groups: list[dict[str, object]], train: TrainSection, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=fused)
