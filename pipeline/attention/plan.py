"""The plan of a row's attention: built once per micro-batch, reused by every layer, never larger than O(T)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from pipeline.attention.flex import build_block_mask
from pipeline.attention.runs import PADDING_CHUNK, RunSplit, split_runs
from pipeline.masks.policies import Policy, dense_mask, get_policy
from pipeline.masks.sidecars import Sidecars, run_first, run_starts


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """How one packed row of T tokens attends; made by :func:`build_plan`."""

    policy: Policy
    sidecars: Sidecars
    """On the CPU, wherever the tables are."""
    runs: RunSplit
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
    def dense_mask(self) -> torch.Tensor:
        """The oracle's bool[T, T] on the plan's device, O(T^2): only the ``dense`` backend asks for it."""
        return dense_mask(self.policy, self.sidecars).to(self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The ``flex`` backend's block mask on the plan's device."""
        return build_block_mask(self.policy, self.sidecars, self.device)

    @cached_property
    def pairs(self) -> int:
        """Allowed (query, key) pairs of tokens that are not padding: the work of one head."""
        total = 0
        for part in self.runs.parts:
            q, k = (np.asarray(lengths, dtype=np.int64) for lengths in (part.q_lengths, part.k_lengths))
            total += int((q * k - (q * (q - 1) // 2 if part.causal else 0)).sum())
        return total - self._padding_pairs

    @property
    def _padding_pairs(self) -> int:
        segment = self.sidecars.segment.numpy()
        place = (np.arange(len(segment)) - run_first(run_starts(segment))) % PADDING_CHUNK
        return int((place + 1)[segment == 0].sum())

    def to(self, device: torch.device | str) -> Plan:
        """Return the plan with its tables on ``device`` (asynchronously from pinned memory)."""
        return Plan(self.policy, self.sidecars, self.runs.to(device), torch.device(device))


def build_plan(policy: Policy | str, sidecars: Sidecars) -> Plan:
    """Build the plan of one row (or of a micro-batch joined by ``Sidecars.concat``) on the CPU.

    Args:
        policy: a policy, or the name of one that does not leak and needs no grid.
        sidecars: of T tokens; a layer that gets the plan must get exactly these T tokens.

    Raises:
        UserError: the policy's name is unknown, or an image does not fit its grid.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    local = Sidecars(*(getattr(sidecars, name).cpu() for name in Sidecars.__dataclass_fields__))
    return Plan(policy, local, split_runs(policy, local), torch.device("cpu"))
