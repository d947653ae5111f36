"""How much device memory a rank needs, counted from the model's shape.

Model states follow ZeRO-3 (arXiv 1910.02054): what is sharded is divided by the data-parallel ranks of a stage; what
the step keeps gathered is not. Activations assume one recomputed layer at a time where checkpointing is on.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.training.blueprint import Blueprint

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of one stage, by purpose."""

    states: float
    """Sharded: compute-type weights, fp32 master weights, two Adam moments, the gradient shard."""
    gathered: float
    """Weights held whole within a step, and the whole gradient where it is reduced once."""
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.gathered + self.activations


def estimate(plan: Blueprint, stage: int) -> MemoryEstimate:
    """Estimate the peak device memory of a rank of one stage."""
    trained, frozen = plan.stage_parameters(stage)
    size, dp = (2 if plan.bf16 else 4), plan.topology.dp
    parallel = plan.config.parallel
    states = (trained * (size + 4 + 8 + 4) + frozen * size) / dp
    gathered = parallel.resident * (trained + frozen) * size + (trained * size if parallel.reduce_once else 0)
    return MemoryEstimate(states, gathered, _activations(plan, stage, size))


def _activations(plan: Blueprint, stage: int, size: int) -> float:
    """One saved input a layer with checkpointing, else about 16 widths + 3 feed-forward widths a layer a token."""
    width, tokens = plan.spec.width, plan.order.micro_packs * plan.packs.manifest.length
    feed_forward = int(getattr(plan.spec.llm, "intermediate_size", 4 * width))
    one_layer = float(tokens * (16 * width + 3 * feed_forward) * size)
    layers = len(plan.splits[stage])
    alive = (
        min(len(plan.splits) - stage, plan.order.micros)
        if plan.config.parallel.schedule == "1f1b"
        else plan.order.micros
    )
    if plan.config.train.gradient_checkpointing:
        return alive * layers * tokens * width * size + one_layer
    return alive * layers * one_layer
