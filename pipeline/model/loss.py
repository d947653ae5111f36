"""The language-model head and its loss, computed without holding all logits at once.

n supervised rows, d hidden width, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 25
"""Logits held at once: 128 MiB in fp32, whatever the vocabulary and the row's length."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the forward pass also computes the gradients, chunk by chunk, from the same logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h_ND: torch.Tensor,
        w_VD: torch.Tensor,
        labels_N: torch.Tensor,
        scale: float,
        softcap: float | None,
        chunk_rows: int,
        with_grad: bool,
    ) -> torch.Tensor:
        """Return the summed loss; see :func:`linear_cross_entropy`. Gradients are kept where ``with_grad`` is set."""
        loss_dtype = torch.promote_types(h_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=loss_dtype, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if with_grad and ctx.needs_input_grad[0] else None
        dw_VD = torch.zeros_like(w_VD, dtype=loss_dtype) if with_grad and ctx.needs_input_grad[1] else None
        for start in range(0, len(h_ND), chunk_rows):
            rows = slice(start, start + chunk_rows)
            h_CD, labels_C1 = h_ND[rows], labels_N[rows, None]
            logits_CV = F.linear(h_CD, w_VD).to(loss_dtype).mul_(scale)
            if softcap is not None:
                logits_CV = logits_CV.div_(softcap).tanh_().mul_(softcap)
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss += (lse_C1 - logits_CV.gather(1, labels_C1)).sum()
            if dh_ND is None and dw_VD is None:
                continue
            slope = None if softcap is None else 1 - (logits_CV / softcap).square()
            d_CV = logits_CV.sub_(lse_C1).exp_()  # softmax, in place of the logits
            d_CV.scatter_add_(1, labels_C1, torch.full_like(lse_C1, -1.0))
            d_CV = d_CV.mul_(scale) if slope is None else d_CV.mul_(slope).mul_(scale)
            d_CV = d_CV.to(h_ND.dtype)
            if dh_ND is not None:
                dh_ND[rows] = d_CV @ w_VD
            if dw_VD is not None:
                _add_product(dw_VD, d_CV.T, h_CD)
        ctx.gradients, ctx.weight_dtype = (dh_ND, dw_VD), w_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients of hidden states [n, d] and weight [V, d] computed by the forward pass; once only."""
        assert ctx.gradients is not None, "the loss was differentiated twice: recompute it first"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None  # scaled in place: a copy would double the peak
        dh_ND = None if dh_ND is None else dh_ND.mul_(grads[0])
        dw_VD = None if dw_VD is None else dw_VD.mul_(grads[0]).to(ctx.weight_dtype)
        return dh_ND, dw_VD, None, None, None, None, None


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right``, without a temporary where the dtypes agree."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


def linear_cross_entropy(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return the *sum* over rows of the cross-entropy of ``softcap(scale * h @ w.T)``; a scalar of at least fp32.

    Args:
        h_ND: hidden states of the supervised rows, [n, d].
        w_VD: weight of the head, [V, d], in the same dtype.
        labels_N: int64[n], the vocabulary row to predict, 0 .. V-1.
        scale: factor of the logits (Granite).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        chunk_rows: rows whose logits are held at once; default: as many as ``CHUNK_LOGITS`` allows.

    With no rows the result is exactly 0.0 but still connected to both inputs, so every rank runs the same backward.
    """
    chunk_rows = chunk_rows or max(16, CHUNK_LOGITS // len(w_VD))
    options = (scale, softcap, chunk_rows, torch.is_grad_enabled())
    return _ChunkedCrossEntropy.apply(h_ND, w_VD, labels_N, *options)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def token_scores(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return float[n, 2], at least fp32: each row's cross-entropy, and 1 where its label has the highest logit, else 0.

    Arguments are those of :func:`linear_cross_entropy`, from the same logits.
    """
    loss_dtype = torch.promote_types(h_ND.dtype, torch.float32)
    scores_N2 = torch.zeros(len(h_ND), 2, dtype=loss_dtype, device=h_ND.device)
    chunk_rows = chunk_rows or max(16, CHUNK_LOGITS // len(w_VD))
    for start in range(0, len(h_ND), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits_CV = F.linear(h_ND[rows], w_VD).to(loss_dtype).mul_(scale)
        if softcap is not None:
            logits_CV = logits_CV.div_(softcap).tanh_().mul_(softcap)
        labels_C = labels_N[rows]
        scores_N2[rows, 0] = logits_CV.logsumexp(-1) - logits_CV.gather(1, labels_C[:, None])[:, 0]
        scores_N2[rows, 1] = (logits_CV.argmax(-1) == labels_C).to(loss_dtype)
    return scores_N2


class LMHead(nn.Linear):
    """The output projection; computes the loss in its own forward, because ZeRO-3 gathers its weight only there."""

    def __init__(self, width: int, vocab_rows: int, *, scale: float = 1.0, softcap: float | None = None) -> None:
        """Build a head without bias; ``scale`` and ``softcap`` as in :func:`linear_cross_entropy`."""
        super().__init__(width, vocab_rows, bias=False)
        self.scale, self.softcap = scale, softcap

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, labels: torch.Tensor, *, per_token: bool = False
    ) -> torch.Tensor:
        """Return the summed loss of hidden[n, d] against labels int64[n], or the `token_scores` float[n, 2]."""
        score = token_scores if per_token else linear_cross_entropy
        return score(hidden, self.weight, labels, scale=self.scale, softcap=self.softcap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return all logits of hidden[..., d], at least fp32[..., V]; for inference on a few rows."""
        raw = F.linear(hidden, self.weight)
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
