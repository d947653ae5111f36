"""``attend``: the one attention call of every layer, over interchangeable backends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Protocol

import torch

from data_prep.common.errors import UserError, did_you_mean
from pipeline.attention import loops, varlen
from pipeline.attention.flex import attend_flex
from pipeline.attention.gather import gather_rows
from pipeline.attention.lse import Kernels, attend_lse
from pipeline.attention.plan import AttentionPlan
from pipeline.attention.runs import RunSplit, VarlenBatch
from pipeline.attention.sdpa_runs import attend_sdpa_runs, sdpa

log = logging.getLogger(__name__)

LSE_COPIES = 8.0
"""Beyond this many gathered keys per token, ``auto`` merges two flash calls on CUDA instead of gathering."""


class Backend(Protocol):
    """Attention of one row: q[1, H, T, D], k and v[1, H_kv, T, D] -> out[1, H, T, D]."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        *,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend; the plan, scaling and softcap are those of :func:`attend`."""
        ...


def attend(
    q_BHTD: torch.Tensor,
    k_BHkTD: torch.Tensor,
    v_BHkTD: torch.Tensor,
    plan: AttentionPlan,
    *,
    backend: str = "auto",
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend one packed row (B = 1) under its plan; differentiable in q, k and v.

    Args:
        q_BHTD: queries [1, H, T, D].
        k_BHkTD: keys [1, H_kv, T, D]; H_kv divides H.
        v_BHkTD: values [1, H_kv, T, D].
        plan: of exactly these T tokens, on the same device.
        backend: a key of ``BACKENDS``, or ``auto``.
        scaling: factor of the logits; default ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Returns:
        out_BHTD [1, H, T, D]. Rows of padding are finite and mean nothing.

    Raises:
        UserError: unknown backend, or shapes that do not fit the plan.
    """
    _check(q_BHTD, k_BHkTD, plan)
    if backend == "auto":
        backend = choose_backend(plan, q_BHTD.device.type, softcap, flash_fits=_flash_fits(q_BHTD))
    if backend not in BACKENDS:
        raise UserError(
            f"unknown attention backend '{backend}'{did_you_mean(backend, BACKENDS)}; known: {', '.join(BACKENDS)}"
        )
    scaling = q_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    return BACKENDS[backend](q_BHTD, k_BHkTD, v_BHkTD, plan, scaling=scaling, softcap=softcap)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, scaling: float, softcap: float | None
) -> torch.Tensor:
    return sdpa(q, k, v, plan.dense_mask, scaling=scaling, softcap=softcap)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, scaling: float, softcap: float | None
) -> torch.Tensor:
    return attend_flex(q, k, v, plan.block_mask, scaling=scaling, softcap=softcap)


def _runsplit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, scaling: float, softcap: float | None
) -> torch.Tensor:
    if _flash_fits(q) and softcap is None:
        return runsplit(q, k, v, plan.runs, partial(varlen.attend_varlen, scaling=scaling))
    return runsplit(q, k, v, plan.runs, partial(_pieces, scaling=scaling, softcap=softcap))


def runsplit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: RunSplit,
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenBatch], torch.Tensor],
) -> torch.Tensor:
    """Gather, attend every part with ``kernel`` (q[T, H, D], k and v[K, H_kv, D] -> out[T, H, D]), and put back."""
    q_THD, k_KHD, v_KHD = (
        gather_rows(x[0].transpose(0, 1), gather) for x, gather in ((q, runs.queries), (k, runs.keys), (v, runs.keys))
    )
    q_sizes, k_sizes = [batch.q_tokens for batch in runs.batches], [batch.k_tokens for batch in runs.batches]
    pieces = zip(torch.split(q_THD, q_sizes), torch.split(k_KHD, k_sizes), torch.split(v_KHD, k_sizes), strict=True)
    outs = [kernel(*tensors, batch) for tensors, batch in zip(pieces, runs.batches, strict=True)]
    out_THD = outs[0] if len(outs) == 1 else torch.cat(outs)
    return gather_rows(out_THD, runs.outputs).transpose(0, 1)[None]


def _pieces(
    q_THD: torch.Tensor,
    k_KHD: torch.Tensor,
    v_KHD: torch.Tensor,
    batch: VarlenBatch,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_KHD, v_KHD))
    return attend_sdpa_runs(q, k, v, batch, scaling=scaling, softcap=softcap)[0].transpose(0, 1)


def _lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, scaling: float, softcap: float | None
) -> torch.Tensor:
    if softcap is not None:
        raise UserError("attention backend 'lse' has no soft cap of logits: use 'runsplit' for this model")
    kernels: Kernels = varlen if _flash_fits(q) else loops
    if q.is_cuda and kernels is loops:
        raise UserError(
            f"attention backend 'lse' needs fp16 or bf16 on CUDA, and heads of a multiple of 8 up to "
            f"{varlen.MAX_HEAD_SIZE}, got {q.dtype} and {q.shape[-1]}: train in bf16, or use 'runsplit'"
        )
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (q, k, v))
    out_THD = attend_lse(q_THD, k_THD, v_THD, plan.rectangles, scaling=scaling, kernels=kernels)
    return out_THD.transpose(0, 1)[None]


def _flash_fits(q: torch.Tensor) -> bool:
    """Whether torch's variable-length flash attention takes queries [..., D]; it pads no head to a multiple of 8."""
    size = q.shape[-1]
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and size <= varlen.MAX_HEAD_SIZE and size % 8 == 0


BACKENDS: Mapping[str, Backend] = {"dense": _dense, "flex": _flex, "lse": _lse, "runsplit": _runsplit}


def choose_backend(plan: AttentionPlan, device: str, softcap: float | None = None, *, flash_fits: bool = True) -> str:
    """Return the backend ``auto`` stands for, and log why once; ``flash_fits``: flash takes the queries on CUDA."""
    mergeable = softcap is None and plan.order is None and not plan.bidirectional and (flash_fits or device != "cuda")
    if mergeable and (plan.run_split is None or (device == "cuda" and plan.gather_ratio > LSE_COPIES)):
        name, reason = "lse", "samples with so many media that gathering keys would cost more"
    elif device == "cuda":
        name, reason = "runsplit", "one variable-length flash call over gathered keys"
    else:
        name, reason = "runsplit", "one fused attention per run"
    _say_once(f"attention: {name} for policy {plan.policy.name} on {device}: {reason}")
    return name


@lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    log.info(message)


def _check(q: torch.Tensor, k: torch.Tensor, plan: AttentionPlan) -> None:
    if q.dim() != 4 or q.shape[0] != 1:
        raise UserError(
            f"a plan is one row: got queries of shape {tuple(q.shape)} where [1, H, T, D] is needed; "
            "join the rows of a micro-batch into one with Sidecars.concat"
        )
    if q.shape[2] != len(plan) or k.shape[2] != len(plan):
        raise UserError(
            f"the plan is of {len(plan)} tokens, but the layer has {q.shape[2]} queries and {k.shape[2]} keys: "
            "build the plan from the sidecars of the same micro-batch"
        )
    if q.shape[1] % k.shape[1]:
        raise UserError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: mend the model's configuration")
