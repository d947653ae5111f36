"""The plan of a row's attention: built once per micro-batch, reused by every layer, never larger than O(T)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from data_prep.common.errors import UserError
from pipeline.attention.flex import build_block_mask
from pipeline.attention.lse import Rectangles, build_rectangles
from pipeline.attention.runs import PADDING_CHUNK, QueryRuns, RunSplit, query_runs, split_runs
from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import IntArray, Sidecars, run_first, run_starts
from pipeline.masks.spans import causal_order

MAX_GATHER_RATIO = 64
"""Run-split refuses to gather more keys than this many times the row's tokens."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPlan:
    """How one packed row of T tokens attends; made by :func:`build_plan`.

    Tables are built once and shared by all layers: those of ``runsplit`` with the plan (in a loader's thread, say),
    those of the other backends at their first use.
    """

    policy: Policy
    sidecars: Sidecars
    """On the CPU, wherever the tables are."""
    cut: QueryRuns
    """The row's runs, in the policy's causal order; on the CPU."""
    order: IntArray | None
    """That order; None for the row's own."""
    run_split: RunSplit | None
    """See :attr:`runs`; None where keys would be copied too often."""
    device: torch.device

    def __len__(self) -> int:
        return len(self.sidecars)

    def __repr__(self) -> str:
        return f"Plan({self.policy.name}, {len(self)} tokens, {self.device})"

    @cached_property
    def longest_segment(self) -> int:
        """Tokens of the longest packed sample."""
        segment = self.sidecars.segment.numpy()
        return int(np.bincount(segment[segment > 0], minlength=1).max())

    @cached_property
    def gather_ratio(self) -> float:
        """Keys that run-split gathers, per token of the row: 1 where nothing is unlocked."""
        return float(self.cut.key_counts.sum() / max(len(self), 1))

    @cached_property
    def bidirectional(self) -> bool:
        """Some run's tokens see each other both ways."""
        return bool(np.any(self.cut.bidirectional & (self.cut.end - self.cut.start > 1)))

    @cached_property
    def pairs(self) -> int:
        """Allowed (query, key) pairs of tokens that are not padding: the work of one head."""
        queries, keys = self.cut.end - self.cut.start, self.cut.key_counts
        hidden = np.where(self.cut.bidirectional, 0, queries * (queries - 1) // 2)
        segment = self.sidecars.segment.numpy()
        place = (np.arange(len(segment)) - run_first(run_starts(segment))) % PADDING_CHUNK
        return int((queries * keys - hidden).sum()) - int((place + 1)[segment == 0].sum())

    @property
    def runs(self) -> RunSplit:
        """The ``runsplit`` backend's tables on the plan's device.

        Raises UserError when a sample alternates between media and text so often that its keys would be copied more
        than ``MAX_GATHER_RATIO`` times.
        """
        if self.run_split is None:
            raise UserError(
                f"attention backend 'runsplit' would gather {self.gather_ratio:.0f} keys per token, because the row's "
                "samples alternate between media and text hundreds of times: use 'lse' (or 'flex' on CUDA)"
            )
        return self.run_split

    @cached_property
    def rectangles(self) -> Rectangles:
        """The ``lse`` backend's tables on the plan's device. Raises UserError for a bidirectional policy."""
        return build_rectangles(self.cut, len(self)).to(self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The ``flex`` backend's block mask on the plan's device. Raises UserError for a policy that reorders."""
        return build_block_mask(self.policy, self.sidecars, self.device)

    @cached_property
    def dense_mask(self) -> torch.Tensor:
        """The oracle's bool[T, T] on the plan's device, O(T^2): only the ``dense`` backend asks for it."""
        return dense_mask(self.policy, self.sidecars).to(self.device)

    def to(self, device: torch.device | str) -> AttentionPlan:
        """Return the plan with its tables on ``device``."""
        moved = None if self.run_split is None else self.run_split.to(device)
        return replace(self, run_split=moved, device=torch.device(device))


def build_plan(policy: Policy | str, sidecars: Sidecars) -> AttentionPlan:
    """Build the plan of one row (or of a micro-batch joined by ``Sidecars.concat``) on the CPU.

    Args:
        policy: a policy, or the name of one that does not leak and needs no grid.
        sidecars: of T tokens; a layer that gets the plan must get exactly these T tokens.

    Raises:
        UserError: the policy's name is unknown, or an image does not fit its grid.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    local = Sidecars(*(getattr(sidecars, name).cpu() for name in Sidecars.__dataclass_fields__))
    table = policy.table(local)
    order = causal_order(policy, table)
    cut = query_runs(policy, table if order is None else table[order])
    plan = AttentionPlan(policy, local, cut, order, None, torch.device("cpu"))
    return plan if plan.gather_ratio > MAX_GATHER_RATIO else replace(plan, run_split=split_runs(cut, order, len(local)))
