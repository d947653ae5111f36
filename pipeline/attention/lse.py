"""Two attentions merged by their log-sum-exp: causal attention of full segments, and rectangles of unlocked pairs.

The causal part gathers nothing, so rows whose samples hold many media need little memory. The backward is that of ring
attention (arXiv 2310.01889): each part is differentiated with the *merged* output and log-sum-exp. Merging two library
calls with plain autograd would pass every forward test and give wrong gradients, because the library's log-sum-exp is
not differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from data_prep.common.errors import UserError
from pipeline.attention.gather import scatter_sum
from pipeline.attention.runs import AttentionState, Gather, Gradients, QueryRuns, VarlenBatch, mover
from pipeline.masks.spans import expand


@dataclass(frozen=True)
class Rectangles:
    """A row's attention as causal segments plus rectangles of unlocked pairs."""

    segments: VarlenBatch
    rectangles: VarlenBatch
    """Bidirectional runs; empty when nothing is unlocked."""
    queries: torch.Tensor
    """Tokens the rectangles add to, each at most once; int64[queries of the rectangles]."""
    keys: Gather
    """Keys of the rectangles."""

    def to(self, device: torch.device | str) -> Rectangles:
        """Return the tables on ``device``."""
        move = mover(device)
        return Rectangles(self.segments.map(move), self.rectangles.map(move), move(self.queries), self.keys.map(move))


def build_rectangles(runs: QueryRuns, tokens: int) -> Rectangles:
    """Convert a row's runs into segments and rectangles.

    Raises UserError for bidirectional runs: they are not a rectangle on top of a causal segment.
    """
    if np.any(runs.bidirectional & (runs.end - runs.start > 1)):
        raise UserError(
            "attention backend 'lse' cannot express this policy, because it is bidirectional within a run: "
            "use 'runsplit'"
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
    """Attention of a batch of runs with log-sum-exp: ``pipeline.attention.varlen`` or ``pipeline.attention.loops``."""

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
        """Return out[T, H, D]: rectangle and causal outputs, weighted by their log-sum-exp."""
        out, lse = kernels.forward_with_lse(q, k, v, tables.segments, scaling)
        if tables.rectangles.q_tokens:
            rows, keys = tables.queries, tables.keys.rows
            near, near_lse = out.index_select(0, rows), lse.index_select(1, rows)
            far, far_lse = kernels.forward_with_lse(
                q.index_select(0, rows), k.index_select(0, keys), v.index_select(0, keys), tables.rectangles, scaling
            )
            both_lse = torch.logaddexp(near_lse, far_lse)
            near_share, far_share = ((own_lse - both_lse).exp().T[..., None] for own_lse in (near_lse, far_lse))
            out.index_copy_(0, rows, (near * near_share + far * far_share).to(out.dtype))
            lse.index_copy_(1, rows, both_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.scaling, ctx.kernels = tables, scaling, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, k and v: both parts' summed, each with the merged output and log-sum-exp."""
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
