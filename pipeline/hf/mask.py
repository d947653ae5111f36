"""The registered attention and mask functions: they give a stock decoder the policy's mask of the current batch.

B rows, Q queries, K keys.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data_prep.common.errors import UserError
from pipeline.attention import AttentionPlan, build_plan
from pipeline.attention.hf import mma_attention
from pipeline.masks import Policy, Sidecars
from pipeline.masks.sidecars import SpanColumns

NAME = "mma_policy"
BACKENDS = ("sdpa", "runsplit", "flex")


@dataclass
class Call:
    """One forward call of an enabled model."""

    policy: Policy
    rows: list[Sidecars]
    backend: str
    device: torch.device
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the call, T."""
        return len(self.rows[0])

    @cached_property
    def plan(self) -> AttentionPlan:
        """The plan of all rows joined, without a mask in memory."""
        plan = build_plan(self.policy, Sidecars.concat(self.rows)).to(self.device)
        return replace(plan, backend="flex") if self.backend == "flex" else plan

    @cached_property
    def mask(self) -> torch.Tensor:
        """The policy's mask, bool[B, T, T]."""
        return torch.stack([_mask_on(self.policy, row, self.device) for row in self.rows])


CURRENT: ContextVar[Call | None] = ContextVar("mma_call", default=None)
"""The call that the enabled model of this thread is in."""


def register() -> str:
    """Register the functions with transformers under one name; return it. Idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, policy_mask)
    return NAME


@torch.compiler.disable  # type: ignore[untyped-decorator]  # built outside the compiled graph
def policy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | AttentionPlan | None:
    """Build the mask of one kind of layer; arguments as transformers' ``sdpa_mask``.

    A decoding step is plainly causal. Several tokens follow the policy among themselves and see the whole cache. Where
    a layer has a window of ``local_size`` tokens, it limits how far back a token sees.

    Returns:
        bool[B, 1, Q, K]; the plan of the batch with the other backends than ``sdpa``; None where transformers needs
        no mask.

    Raises:
        UserError: the model was not called itself, or its cache is static.
    """
    call = CURRENT.get()
    if q_length == 1:
        kwargs |= {"local_size": local_size, "attention_mask": attention_mask, "device": device}
        plain: torch.Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)
        return plain
    if call is None or isinstance(q_offset, torch.Tensor):
        raise UserError(
            "MMA builds its mask inside the model's own forward: call the enabled model itself, not a part of it, and "
            "generate without a static cache (cache_implementation)"
        )
    if call.backend != "sdpa" and q_offset == 0 and kv_length == q_length:
        return call.plan
    return _with_cache(call, batch_size, kv_length, q_offset, kv_offset, attention_mask, local_size)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionPlan | torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend under a mask or a plan; with a plan the B rows are joined: q[B, H, T, D] -> out[B, T, H, D]."""
    rows = query.shape[0]
    if not isinstance(attention_mask, AttentionPlan) or rows == 1:
        return mma_attention(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    out, _ = mma_attention(module, q, k, v, attention_mask, **kwargs)
    return out.view(rows, -1, *out.shape[2:]), None


def _with_cache(
    call: Call,
    batch_size: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    padding: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Return the mask of the call's tokens over cached keys, their own keys and unused ones; bool[B, 1, Q, K]."""
    queries = q_offset + torch.arange(call.tokens, device=call.device)
    keys = kv_offset + torch.arange(kv_length, device=call.device)
    mask = (keys < q_offset).expand(batch_size, call.tokens, -1).clone()
    if padding is not None:
        known = keys.clamp_max(padding.shape[1] - 1)
        mask &= (padding[:, known] & (keys < padding.shape[1]))[:, None]
    own = (keys >= q_offset) & (keys < q_offset + call.tokens)
    mask[:, :, own] = call.mask[:, :, keys[own] - q_offset]
    if window is not None:
        mask &= keys > queries[:, None] - window
    return mask[:, None]


def _mask_on(policy: Policy, sidecars: Sidecars, device: torch.device) -> torch.Tensor:
    """Return the policy's mask, bool[T, T], computed on ``device``; equal to the oracle ``dense_mask``."""
    table = policy.table(sidecars)

    def column(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    segment, index = column(table.segment), torch.arange(len(table), device=device)
    allowed = index[None] <= index[:, None]
    if policy.grid is not None:  # inside an image the order is by ring, not by index
        instance, ring = column(table.instance), column(table.ring)
        inside = (instance[:, None] == instance[None]) & (instance >= 0)[:, None]
        allowed = torch.where(inside, ring[None] <= ring[:, None], allowed)
    if policy.unlock is not None:
        # Predicates only compare and combine, so they also work on tensors.
        tokens: Any = SpanColumns(*(column(values) for values in table.span_columns))  # type: ignore[arg-type]
        limit = column(table.segment_end if policy.leaks else table.commit)
        unlocked: Any = policy.unlock(tokens.at((slice(None), None)), tokens.at((None, slice(None))))
        allowed = allowed | (unlocked & (index[None] <= limit[:, None]))
    same = (segment[:, None] == segment[None]) & (segment[:, None] > 0)
    return (same & allowed) | (index[None] == index[:, None])
