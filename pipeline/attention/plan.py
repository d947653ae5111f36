"""The attention plan of a row: built once per micro-batch, shared by all layers, O(T) in size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from data_prep.common.errors import UserError
from data_prep.common.modalities import IMAGE, TEXT
from pipeline.attention.flex import build_block_mask
from pipeline.attention.lse import Rectangles, build_rectangles
from pipeline.attention.runs import PADDING_CHUNK, QueryRuns, RunSplit, query_runs, split_runs
from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import IntArray, Sidecars, run_first, run_starts
from pipeline.masks.spans import causal_order

MAX_GATHER_RATIO = 64
"""``runsplit`` refuses to gather more keys per token than this."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPlan:
    """How one packed row of T tokens attends; built by :func:`build_plan`.

    All layers share the tables. Those of ``runsplit`` are built with the plan (for example in a loader thread), those
    of the other backends at first use.
    """

    policy: Policy
    sidecars: Sidecars
    """On the CPU, whatever the plan's device."""
    query_runs: QueryRuns
    """The row's runs in the policy's causal order; on the CPU."""
    order: IntArray | None
    """The policy's causal order, int64[T]; None for the row's own order."""
    run_split: RunSplit | None
    """See :attr:`runs`; None where too many keys would be gathered."""
    device: torch.device
    backend: str | None = None
    """The backend that ``auto`` selects; None: by device and policy."""
    others: tuple[AttentionPlan, ...] = ()
    """Plans of the policy's other parts, where it changes with the layer; see :meth:`at`."""
    layers: tuple[tuple[range, int], ...] = ()
    """Decoder layers in which a plan of ``others`` holds, by its index."""

    def __len__(self) -> int:
        return len(self.sidecars)

    def __repr__(self) -> str:
        return f"AttentionPlan({self.policy.name}, {len(self)} tokens, {self.device})"

    def at(self, layer: int) -> AttentionPlan:
        """Return the plan of one decoder layer, counted from 0."""
        return next((self.others[other] for layers, other in self.layers if layer in layers), self)

    @cached_property
    def longest_segment(self) -> int:
        """Tokens of the longest packed sample."""
        segment = self.sidecars.segment.numpy()
        return int(np.bincount(segment[segment > 0], minlength=1).max())

    @cached_property
    def gather_ratio(self) -> float:
        """Keys that ``runsplit`` gathers per token of the row; 1 where nothing is unlocked."""
        return float(self.query_runs.key_counts.sum() / max(len(self), 1))

    @cached_property
    def bidirectional(self) -> bool:
        """Whether the tokens of some run see each other both ways."""
        return bool(np.any(self.query_runs.bidirectional & (self.query_runs.end - self.query_runs.start > 1)))

    @cached_property
    def pairs(self) -> int:
        """Allowed (query, key) pairs, padding excluded: the work of one head."""
        queries, keys = self.query_runs.end - self.query_runs.start, self.query_runs.key_counts
        hidden = np.where(self.query_runs.bidirectional, 0, queries * (queries - 1) // 2)
        segment = self.sidecars.segment.numpy()
        place = (np.arange(len(segment)) - run_first(run_starts(segment))) % PADDING_CHUNK
        return int((queries * keys - hidden).sum()) - int((place + 1)[segment == 0].sum())

    @cached_property
    def visual(self) -> torch.Tensor:
        """Which tokens are media, bool[T] on the plan's device."""
        return (self.sidecars.modality != TEXT).to(self.device, non_blocking=True)

    @property
    def runs(self) -> RunSplit:
        """Tables of the ``runsplit`` backend on the plan's device.

        Raises UserError when samples alternate between media and text so often that more than ``MAX_GATHER_RATIO``
        keys per token would be gathered.
        """
        if self.run_split is None:
            raise UserError(
                f"attention backend 'runsplit' would gather {self.gather_ratio:.0f} keys per token, because samples of "
                "the row alternate between media and text hundreds of times: use 'lse' (or 'flex' on CUDA)"
            )
        return self.run_split

    @cached_property
    def rectangles(self) -> Rectangles:
        """Tables of the ``lse`` backend on the plan's device. Raises UserError for a bidirectional policy."""
        return build_rectangles(self.query_runs, len(self)).to(self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Block mask of the ``flex`` backend on the plan's device. Raises UserError if the policy reorders tokens."""
        return build_block_mask(self.policy, self.sidecars, self.device)

    @cached_property
    def dense_mask(self) -> torch.Tensor:
        """The oracle's mask, bool[T, T] on the plan's device; O(T^2) memory, used by the ``dense`` backend only."""
        return dense_mask(self.policy, self.sidecars).to(self.device)

    def pin_memory(self) -> AttentionPlan:
        """Return the plan with its tables in page-locked memory; copies from it to a GPU do not stop the host."""
        pinned = None if self.run_split is None else self.run_split.map(torch.Tensor.pin_memory)
        return replace(self, run_split=pinned, others=tuple(plan.pin_memory() for plan in self.others))

    def to(self, device: torch.device | str) -> AttentionPlan:
        """Return the plan with its tables on ``device``."""
        moved = None if self.run_split is None else self.run_split.to(device)
        others = tuple(plan.to(device) for plan in self.others)
        return replace(self, run_split=moved, device=torch.device(device), others=others)


def build_plan(policy: Policy | str, sidecars: Sidecars) -> AttentionPlan:
    """Build the plan of one row (or of a micro-batch joined by ``Sidecars.concat``) on the CPU.

    Args:
        policy: a policy, or the name of one that neither leaks nor needs a grid. The plan itself is that of the base of
            a policy that changes with the layer; :meth:`AttentionPlan.at` returns the others.
        sidecars: of T tokens; the plan is valid for exactly these T tokens.

    Raises:
        UserError: the policy is unknown, or an image does not fit the policy's grid.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    local = Sidecars(*(getattr(sidecars, name).cpu() for name in Sidecars.__dataclass_fields__))
    names = [part.name for part in policy.parts]
    base, *others = (_build_part(part, local) for part in policy.parts)
    layers = tuple((where, names.index(part.name) - 1) for where, part in policy.layers if part.name != names[0])
    return replace(base, others=tuple(others), layers=layers)


def build_separate_plan(lengths: Sequence[int]) -> AttentionPlan:
    """Build the plan of images packed into one sequence, patches that all see all patches of their own image.

    Args:
        lengths: patches of each image.
    """
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    text = torch.zeros_like(number)
    return build_plan("mixed", Sidecars(segment=number + 1, modality=text + IMAGE, instance=number, generated=text))


def _build_part(policy: Policy, local: Sidecars) -> AttentionPlan:
    """Build the plan of a policy that is the same in all layers."""
    table = policy.table(local)
    order = causal_order(policy, table)
    runs = query_runs(policy, table if order is None else table[order])
    plan = AttentionPlan(policy, local, runs, order, None, torch.device("cpu"))
    if plan.gather_ratio > MAX_GATHER_RATIO:
        return plan
    return replace(plan, run_split=split_runs(runs, order, len(local)))
