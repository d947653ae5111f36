"""Two attentions merged by their log-sum-exp: whole segments causally, and rectangles of what a policy unlocks.

Nothing of the causal part is gathered, so rows whose samples hold many media cost little memory. The backward is that
of ring attention: each part is differentiated with the *merged* output and log-sum-exp. (Merging two library calls
with plain autograd passes every test of the forward and gives wrong gradients: log-sum-exp is not differentiable
there.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from data_prep.common.errors import UserError
from pipeline.attention.gather import scatter_sum
from pipeline.attention.runs import AttentionState, Gather, Gradients, QueryRuns, VarlenBatch
from pipeline.masks.spans import expand


@dataclass(frozen=True)
class Rectangles:
    """A row's attention as causal segments and full rectangles on top of them."""

    segments: VarlenBatch
    rectangles: VarlenBatch
    """Full runs; none when nothing is unlocked."""
    queries: torch.Tensor
    """Tokens whose rows the rectangles add to, each at most once; int64."""
    keys: Gather
    """The rectangles' keys."""

    def to(self, device: torch.device | str) -> Rectangles:
        """Return the tables on ``device``."""
        return Rectangles(
            self.segments.to(device), self.rectangles.to(device), self.queries.to(device), self.keys.to(device)
        )


def build_rectangles(runs: QueryRuns, tokens: int) -> Rectangles:
    """Turn a row's runs into segments and rectangles.

    Raises UserError when tokens of a run see each other both ways: that is no rectangle on top of a causal segment.
    """
    if np.any(runs.bidirectional & (runs.end - runs.start > 1)):
        raise UserError(
            "attention backend 'lse' adds to causal attention, but this policy is bidirectional too: use 'runsplit'"
        )
    segment_start = runs.start[runs.start == runs.first_key]
    lengths = np.diff(np.append(segment_start, tokens))
    later = runs.key_start >= runs.end[runs.key_run]
    widths = np.bincount(runs.key_run, weights=(runs.key_end - runs.key_start) * later, minlength=len(runs.start))
    wide = np.flatnonzero(widths)
    return Rectangles(
        segments=VarlenBatch.build(True, lengths, lengths),
        rectangles=VarlenBatch.build(False, (runs.end - runs.start)[wide], widths[wide].astype(np.int64)),
        queries=torch.from_numpy(expand(runs.start[wide], runs.end[wide])),
        keys=Gather.of(expand(runs.key_start[later], runs.key_end[later]), tokens),
    )


class Kernels(Protocol):
    """Attention of a part with its log-sum-exp: ``pipeline.attention.varlen`` or ``pipeline.attention.loops``."""

    def forward_with_lse(
        self, q_THD: torch.Tensor, k_KHkD: torch.Tensor, v_KHkD: torch.Tensor, batch: VarlenBatch, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out[T, H, D] and log-sum-exp[H, T]."""
        ...

    def backward_with_lse(
        self, gradient_THD: torch.Tensor, state: AttentionState, batch: VarlenBatch, scaling: float
    ) -> Gradients:
        """Return the gradients of q, k and v."""
        ...


def attend_lse(
    q_THD: torch.Tensor,
    k_THkD: torch.Tensor,
    v_THkD: torch.Tensor,
    tables: Rectangles,
    *,
    scaling: float,
    kernels: Kernels,
) -> torch.Tensor:
    """Attend a row of T tokens; out[T, H, D], differentiable in q, k and v."""
    out: torch.Tensor = _Merged.apply(q_THD, k_THkD, v_THkD, tables, scaling, kernels)  # type: ignore[no-untyped-call]
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: Rectangles,
        scaling: float,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Return out[T, H, D]: rows of the rectangles weighed against the causal part by their log-sum-exp."""
        out, lse = kernels.forward_with_lse(q, k, v, tables.segments, scaling)
        if tables.rectangles.q_tokens:
            rows, keys = tables.queries, tables.keys.rows
            near, near_lse = out.index_select(0, rows), lse.index_select(1, rows)
            far, far_lse = kernels.forward_with_lse(
                q.index_select(0, rows), k.index_select(0, keys), v.index_select(0, keys), tables.rectangles, scaling
            )
            both_lse = torch.logaddexp(near_lse, far_lse)
            near_share, far_share = ((batch - both_lse).exp().T[..., None] for batch in (near_lse, far_lse))
            out.index_copy_(0, rows, (near * near_share + far * far_share).to(out.dtype))
            lse.index_copy_(1, rows, both_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.scaling, ctx.kernels = tables, scaling, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, k and v: the sums of both parts', each with the merged output and log-sum-exp."""
        gradient = gradients[0]
        state = AttentionState(*ctx.saved_tensors)
        tables, scaling, kernels = ctx.tables, ctx.scaling, ctx.kernels
        dq, dk, dv = kernels.backward_with_lse(gradient, state, tables.segments, scaling)
        if tables.rectangles.q_tokens:
            rows, keys = tables.queries, tables.keys
            far = AttentionState(
                q_THD=state.q_THD.index_select(0, rows),
                k_KHkD=state.k_KHkD.index_select(0, keys.rows),
                v_KHkD=state.v_KHkD.index_select(0, keys.rows),
                out_THD=state.out_THD.index_select(0, rows),
                lse_HT=state.lse_HT.index_select(1, rows),
            )
            far_dq, far_dk, far_dv = kernels.backward_with_lse(
                gradient.index_select(0, rows), far, tables.rectangles, scaling
            )
            dq.index_copy_(0, rows, dq.index_select(0, rows) + far_dq)  # rows are distinct: no atomics
            dk, dv = dk + scatter_sum(far_dk, keys), dv + scatter_sum(far_dv, keys)
        return dq, dk, dv, None, None, None
