"""Predicted time of a step from a roofline: what each part computes and moves, against what the hardware can do.

Nothing is measured. An action (the forward or backward of a micro-batch on a virtual stage) takes as long as the slower
of the GPU's work and the host's launches; the schedule simulator puts the actions in order; collectives of ZeRO and the
update come on top, because a stage gathers before its first and reduces after its last micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pipeline.config.schema import is_recomputed
from pipeline.model.counts import Cost
from pipeline.parallel.schedule import Action
from pipeline.parallel.simulation import Simulation, simulate
from pipeline.planning.estimate import WorkloadEstimate
from pipeline.planning.hardware import Hardware

FORWARD_OPERATORS, BACKWARD_OPERATORS = 150, 215
"""Operators that the host launches for one decoder layer; with recomputation a layer's forward counts twice. With it,
about 500 a layer were counted for AKI-4B."""
_BACKWARD_OF_ATTENTION = 2.5
"""FLOPs of attention's backward relative to its forward (arXiv 2205.14135)."""
_UPDATE_BYTES = 30
"""Memory traffic of AdamW per trained parameter of a rank: fp32 weight and two moments read and written, the gradient
read, the new weight written in bf16."""


class Workload(NamedTuple):
    """What the rows of a run hold."""

    image_share: float
    """Images per token."""
    target_share: float
    """Supervised tokens per token."""
    sample_tokens: float
    """Mean tokens of a sample."""


class ActionTime(NamedTuple):
    """Seconds of one action on the GPU, by kind of work, and on the host."""

    matrices: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0
    tower: float = 0.0
    host: float = 0.0

    @property
    def gpu(self) -> float:
        """All work of the GPU."""
        return self.matrices + self.attention + self.pointwise + self.tower

    @property
    def seconds(self) -> float:
        """The slower of GPU and host."""
        return max(self.gpu, self.host)

    def plus(self, other: ActionTime) -> ActionTime:
        """Return the sum of both, part by part."""
        return ActionTime(*map(sum, zip(self, other, strict=True)))


@dataclass(frozen=True)
class Roofline:
    """A model on a grid of GPUs."""

    load: WorkloadEstimate
    work: Workload
    hardware: Hardware

    @cached_property
    def simulation(self) -> Simulation:
        """The micro-batches of one step, in seconds."""
        times = self.action_times

        def cost(stage: int, action: Action) -> float:
            return times[stage][action.virtual_stage][action.kind == "B"].seconds

        virtual_stages = len(self.load.split.stage_layers[0])
        return simulate(self.load.orders, cost, virtual_stages, message=self.message_s)

    @cached_property
    def action_times(self) -> list[list[tuple[ActionTime, ActionTime]]]:
        """(forward, backward) of every stage and virtual stage."""
        return [
            [self._of_virtual_stage(stage, number) for number in range(len(own))]
            for stage, own in enumerate(self.load.split.stage_layers)
        ]

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.simulation.makespan + self.communication_s + self.update_s

    @cached_property
    def communication_s(self) -> float:
        """Seconds of ZeRO's collectives in a step, on the slowest stage; they overlap with nothing."""
        return max(self._communication_s(stage) for stage in range(self._stages))

    @cached_property
    def update_s(self) -> float:
        """Seconds of AdamW on the largest stage, and of the norm over all ranks."""
        world = self._stages * self.load.dp
        most = max(self.load.split.parameters(stage)[0] for stage in range(self._stages))
        norm = self.hardware.collective_s(0, min(world, self.hardware.gpus_per_node)) * 2
        return most / self.load.dp * _UPDATE_BYTES / self.hardware.bytes_per_s + norm

    @cached_property
    def message_s(self) -> float:
        """Seconds in which a micro-batch's hidden states reach the next stage."""
        size = self.load.microbatch_tokens * self.load.spec.width * self._size
        return self.hardware.message_s(size, across_nodes=self._crosses_nodes) if self._stages > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, over all GPUs."""
        return self._step_tokens / self.step_s

    @property
    def samples_per_s(self) -> float:
        """Samples a second, over all GPUs."""
        return self.tokens_per_s / self.work.sample_tokens

    @property
    def images_per_s(self) -> float:
        """Images a second that one rank of the first stage has to load."""
        return self.tokens_per_s * self.work.image_share / self.load.dp

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, as the trainer logs it: recomputation and attention scores do not count."""
        tokens = self._step_tokens
        flops = self.load.split.counts.step_flops(
            tokens=tokens, targets=round(tokens * self.work.target_share), images=round(tokens * self.work.image_share)
        )
        return flops / self.step_s / (self.hardware.peak_flops * self._stages * self.load.dp)

    @property
    def is_host_bound(self) -> bool:
        """Whether some action waits for the host."""
        return any(one.host > one.gpu for stage in self.action_times for both in stage for one in both)

    def parts(self) -> dict[str, float]:
        """Return the seconds of a step by purpose, as the busiest stage spends them; they sum to `step_s`."""
        of_stages = [self._total(stage) for stage in range(self._stages)]
        busiest = max(range(self._stages), key=lambda stage: self._busy_s(stage))
        total, busy = of_stages[busiest], self._busy_s(busiest)
        return {
            **{name: getattr(total, name) for name in ("matrices", "attention", "pointwise", "tower")},
            "host": busy - total.gpu,
            "bubble": self.simulation.makespan - busy,
            "communication": self.communication_s,
            "update": self.update_s,
        }

    def bytes_per_step(self, stage: int) -> dict[str, float]:
        """Return what a rank of a stage receives in a step, in bytes: gathers, reduce-scatters, hidden states."""
        gathers, reductions = self._collective_bytes(stage)
        share = (self.load.dp - 1) / self.load.dp
        hidden = self.load.microbatch_tokens * self.load.spec.width * self._size * self.load.microbatches
        virtual = len(self.load.split.stage_layers[stage])
        neighbours = (stage > 0) + (stage < self._stages - 1) if virtual == 1 else 2
        return {"gather": gathers * share, "reduce": reductions * share, "hidden": hidden * neighbours * virtual}

    # ---- parts

    @property
    def _stages(self) -> int:
        return len(self.load.split.stage_layers)

    @property
    def _size(self) -> int:
        return 2 if self.load.bf16 else 4

    @property
    def _step_tokens(self) -> int:
        return self.load.microbatch_tokens * self.load.microbatches * self.load.dp

    @property
    def _crosses_nodes(self) -> bool:
        """Rank = stage x dp + dp rank: neighbours of a pipeline are dp ranks apart."""
        return self._stages * self.load.dp > self.hardware.gpus_per_node

    def _busy_s(self, stage: int) -> float:
        return sum(slot.end - slot.start for slot in self.simulation.slots[stage])

    def _total(self, stage: int) -> ActionTime:
        """Return the work of all micro-batches of a stage."""
        total = ActionTime()
        for forward, backward in self.action_times[stage]:
            total = total.plus(forward).plus(backward)
        return ActionTime(*(self.load.microbatches * part for part in total))

    def _of_virtual_stage(self, stage: int, number: int) -> tuple[ActionTime, ActionTime]:
        split, last = self.load.split, (self._stages - 1, len(self.load.split.stage_layers[-1]) - 1)
        before, *layers, after = split.costs
        total = (ActionTime(), ActionTime())
        for layer in split.stage_layers[stage][number]:
            total = _added(total, self._of_layer(layers[layer], layer))
        if (stage, number) == (0, 0):
            total = _added(total, self._of_images(before))
        if (stage, number) == last:
            total = _added(total, self._of_head(after))
        return total

    def _of_layer(self, cost: Cost, layer: int) -> tuple[ActionTime, ActionTime]:
        """Return forward and backward of one decoder layer, counted from 0."""
        tokens, hardware = self.load.microbatch_tokens, self.hardware
        again = int(is_recomputed(layer, self.load.config.train.recomputed_layers))
        matrices = [self._matrices(flops) for flops in cost]
        attention = tokens * self._attention_flops / (hardware.peak_flops * hardware.attention_share)
        pointwise = tokens * self._pointwise_bytes / hardware.bytes_per_s
        back = (_BACKWARD_OF_ATTENTION + again, 2 + again) if cost.backward else (0, 0)
        launched = FORWARD_OPERATORS, (BACKWARD_OPERATORS + again * FORWARD_OPERATORS) * bool(cost.backward)
        host = [operators * hardware.host_us * 1e-6 for operators in launched]
        return (
            ActionTime(matrices[0], attention, pointwise, host=host[0]),
            ActionTime(matrices[1], back[0] * attention, back[1] * pointwise, host=host[1]),
        )

    def _of_images(self, cost: Cost) -> tuple[ActionTime, ActionTime]:
        """Return forward and backward of vision tower and connector."""
        counts, hardware = self.load.split.counts, self.hardware
        forward = 2.0 * counts.vision * counts.patches * self.work.image_share
        trained = counts.trained.vision / counts.vision if counts.vision else 0.0
        tower = Cost(forward, 2 * forward * trained)
        speed = hardware.peak_flops * hardware.tower_share
        times = [
            ActionTime(matrices=self._matrices(max(0.0, whole - own)), tower=own * self.load.microbatch_tokens / speed)
            for whole, own in zip(cost, tower, strict=True)
        ]
        return times[0], times[1]

    def _of_head(self, cost: Cost) -> tuple[ActionTime, ActionTime]:
        """Return forward and backward of head and loss; the loss computes the head's gradient in its forward."""
        logits = self.load.microbatch_tokens * self.work.target_share * self.load.spec.vocab_rows
        moved = 4 * self._size * 2 * logits / self.hardware.bytes_per_s  # logits, fp32 copy, softmax, gradient
        return ActionTime(self._matrices(sum(cost)), pointwise=moved), ActionTime()

    def _matrices(self, flops_per_token: float) -> float:
        peak = self.hardware.peak_flops * self.hardware.matrix_share
        return self.load.microbatch_tokens * flops_per_token / peak

    @cached_property
    def _heads(self) -> tuple[int, int]:
        """Width of all queries and of all keys."""
        llm, family = self.load.spec.llm, self.load.spec.llm_family
        size, queries = family.head_size(llm), int(llm.num_attention_heads)
        return size * queries, size * int(getattr(llm, "num_key_value_heads", None) or queries)

    @cached_property
    def _attention_flops(self) -> float:
        """FLOPs of one layer's scores and values per token.

        Under MMA, text sees the half of its sample before it, and images, about half of the tokens, see all of it.
        """
        return 4 * self._heads[0] * self.work.sample_tokens * 0.75

    @cached_property
    def _pointwise_bytes(self) -> float:
        """Memory traffic of one layer's unfused operators per token.

        In bytes an element: two norms in fp32 (32 each), rotary embedding of queries and keys (20), activation and
        product of the feed-forward (10), two residual sums (6 each), and the gathers of attention (4).
        """
        queries, keys = self._heads
        feed_forward = self.load.spec.llm_family.feed_forward_width(self.load.spec.llm)
        elements = 76 * self.load.spec.width + 20 * (queries + keys) + 10 * feed_forward + 4 * 2 * (queries + keys)
        return elements * self._size / 2

    def _collective_bytes(self, stage: int) -> tuple[float, float]:
        """Return the bytes that a stage gathers and reduces in a step."""
        (trained, frozen), sharding = self.load.split.parameters(stage), self.load.sharding
        kept, count = sharding.gathered_fraction, self.load.microbatches
        gathers = (trained + frozen) * self._size * (kept + (1 - kept) * 2 * count)
        return gathers, trained * self._size * (1 if sharding.reduce_once else count)

    def _communication_s(self, stage: int) -> float:
        sharding, count = self.load.sharding, self.load.microbatches
        gathers, reductions = self._collective_bytes(stage)
        modules = sum(len(layers) for layers in self.load.split.stage_layers[stage])
        pieces = 1 if sharding.gathered_fraction == 1 else 2 * count * modules
        hardware, dp = self.hardware, self.load.dp
        reduced = modules * (1 if sharding.reduce_once else count)
        return hardware.collective_s(gathers, dp, count=pieces) + hardware.collective_s(reductions, dp, count=reduced)


def _added(total: Sequence[ActionTime], more: Sequence[ActionTime]) -> tuple[ActionTime, ActionTime]:
    return total[0].plus(more[0]), total[1].plus(more[1])
