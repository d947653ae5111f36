"""Memory and work of a rank of each stage, computed from the model's shape before anything starts.

Model states follow ZeRO (arXiv 1910.02054): sharded states are divided by the data-parallel ranks of a stage, gathered
ones are not. Offloaded states count as host memory. With gradient checkpointing, one layer is recomputed at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig, is_recomputed
from pipeline.model.spec import ModelSpec
from pipeline.parallel.ds_config import Sharding
from pipeline.parallel.partition import joined
from pipeline.parallel.schedule import Action
from pipeline.parallel.simulation import orders, peak_in_flight, simulate
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.stage_split import StageSplit

GIB = 2**30
_RECOMPUTED = (0, 8, 4, 3, 2, 1)
"""What ``gradient_checkpointing: auto`` tries: every k-th layer, from the fastest to the smallest."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes needed by one rank of a stage, by purpose."""

    states: float
    """Sharded: compute-type weights, fp32 master weights, two Adam moments, the gradient shard."""
    gathered: float
    """Weights gathered within a step, and the unsharded fp32 gradient if it is reduced once."""
    activations: float
    losses: float = 0.0
    """On the last stage, the head's fp32 gradient that each loss holds until its backward."""
    host: float = 0.0
    """Sharded states in host memory, not included in the others."""

    @property
    def total(self) -> float:
        """Total on the device."""
        return self.states + self.gathered + self.activations + self.losses


@dataclass(frozen=True)
class WorkloadEstimate:
    """A model on a grid: everything that memory depends on."""

    config: RunConfig
    sharding: Sharding
    spec: ModelSpec
    split: StageSplit
    dp: int
    microbatches: int
    """Micro-batches of a step on each data-parallel rank."""
    microbatch_tokens: int
    bf16: bool

    @classmethod
    def of(cls, plan: RunPlan) -> WorkloadEstimate:
        """Return the workload of a run plan."""
        tokens = plan.order.microbatch_rows * plan.packs.manifest.seq_len
        return cls(
            plan.config, plan.sharding, plan.spec, plan.split, plan.topology.dp,
            plan.order.microbatches, tokens, plan.bf16,
        )  # fmt: skip

    @property
    def is_predictable(self) -> bool:
        """Whether a roofline describes it: in bf16, with all states on the device."""
        return self.bf16 and not (self.sharding.offload_params or self.sharding.offload_optimizer)

    @property
    def orders(self) -> list[Sequence[Action]]:
        """The actions of every stage in a step, in order."""
        return orders(
            self.config.parallel.schedule,
            len(self.split.stage_layers),
            self.microbatches,
            len(self.split.stage_layers[0]),
        )

    @property
    def bubble(self) -> float:
        """Share of a step in which stages wait for each other, from the cost of their parts."""
        costs = [
            [self.split.work(stage, virtual_stage) for virtual_stage in range(len(own))]
            for stage, own in enumerate(self.split.stage_layers)
        ]

        def cost(stage: int, action: Action) -> float:
            return costs[stage][action.virtual_stage][action.kind == "B"]

        return simulate(self.orders, cost, len(self.split.stage_layers[0])).bubble

    def memory(self, stage: int, recomputed: int | None = None) -> MemoryEstimate:
        """Estimate the peak device memory of a rank of one stage.

        ``recomputed`` is k where every k-th decoder layer is recomputed, 0 = none; None = as configured.
        """
        trained, frozen = self.split.parameters(stage)
        size, sharding = (2 if self.bf16 else 4), self.sharding
        shards, optimizer = (trained + frozen) * size / self.dp, trained * (4 + 8 + 4) / self.dp
        host = shards * sharding.offload_params + optimizer * sharding.offload_optimizer
        whole = max(sharding.gathered_fraction * (trained + frozen), self._largest_module(stage))
        gathered = whole * size + (trained * 4 if sharding.reduce_once else 0)
        every = self.config.train.recomputed_layers if recomputed is None else recomputed
        losses = 4 * self.spec.vocab_rows * self.spec.width * self._open_losses(stage)
        return MemoryEstimate(shards + optimizer - host, gathered, self._activations(stage, size, every), losses, host)

    def _largest_module(self, stage: int) -> int:
        """Parameters of the largest module, which is gathered while it runs even if nothing stays gathered."""
        modules = [self.split.counts.layers[layer] for layer in joined(self.split.stage_layers[stage])]
        if stage == 0:
            modules += [self.split.counts.connector, self.split.counts.embed]
        if stage == len(self.split.stage_layers) - 1:
            modules.append(self.split.counts.head or self.split.counts.embed)
        return max(modules)

    def recomputation_for(self, stage: int, available: float) -> int:
        """Return the k of ``auto``: recompute as few layers as ``available`` bytes on the device allow; 0 = none."""
        return next((k for k in _RECOMPUTED if self.memory(stage, k).total <= available), 1)

    def _activations(self, stage: int, size: int, every: int) -> float:
        """One saved input for a recomputed layer; for others about 16 + 3 feed-forward widths per layer and token."""
        width = self.spec.width
        feed_forward = self.spec.llm_family.feed_forward_width(self.spec.llm)
        one_layer = float(self.microbatch_tokens * (16 * width + 3 * feed_forward) * size)
        saved_input = float(self.microbatch_tokens * width * size)
        again = [[is_recomputed(layer, every) for layer in own] for own in self.split.stage_layers[stage]]
        saved = [sum(saved_input if recomputed else one_layer for recomputed in own) for own in again]
        return peak_in_flight(self.orders[stage], saved) + one_layer * any(map(any, again))

    def _open_losses(self, stage: int) -> float:
        """Peak number of micro-batches between the loss, which computes the head's gradient, and its backward."""
        if stage < len(self.split.stage_layers) - 1:
            return 0.0
        return peak_in_flight(self.orders[stage], [0] * (len(self.split.stage_layers[stage]) - 1) + [1])
