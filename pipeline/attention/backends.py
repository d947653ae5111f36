"""``attend``: the attention call of every layer, with interchangeable backends."""

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
from pipeline.attention.self_check import check_flash

log = logging.getLogger(__name__)

LSE_GATHER_RATIO = 8.0
"""Above this many gathered keys per token, ``auto`` on CUDA merges two flash calls instead of gathering keys."""


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
        """Attend; plan, scaling and softcap as in :func:`attend`."""
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
        q_BHTD: queries [1, H, T, D], of any floating dtype.
        k_BHkTD: keys [1, H_kv, T, D]; H_kv divides H.
        v_BHkTD: values [1, H_kv, T, D].
        plan: the plan of these T tokens, on the same device.
        backend: a key of ``BACKENDS``, or ``auto``.
        scaling: factor of the logits; default ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).

    Returns:
        out_BHTD [1, H, T, D] in the dtype of ``q_BHTD``. Rows of padding are finite and meaningless.

    Raises:
        UserError: the backend is unknown or cannot run this policy or dtype, or shapes do not match the plan.
    """
    _check(q_BHTD, k_BHkTD, plan)
    if backend == "auto":
        flash_fits = _flash_fits(q_BHTD)
        backend = plan.backend or choose_backend(plan, q_BHTD.device.type, softcap, flash_fits=flash_fits)
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
    if softcap is None and _flash(q):
        return runsplit(q, k, v, plan.runs, partial(varlen.attend_varlen, scaling=scaling))
    return runsplit(q, k, v, plan.runs, partial(_sdpa_runs, scaling=scaling, softcap=softcap))


def runsplit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: RunSplit,
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenBatch], torch.Tensor],
) -> torch.Tensor:
    """Gather queries and keys, attend each batch of runs with ``kernel``, and restore the order of the queries.

    Args:
        q: queries [1, H, T, D].
        k: keys [1, H_kv, T, D].
        v: values [1, H_kv, T, D].
        runs: the row's tables, on the same device.
        kernel: q[T, H, D], k and v[K, H_kv, D], batch -> out[T, H, D].

    Returns:
        out [1, H, T, D].
    """
    q_THD, k_KHD, v_KHD = (
        gather_rows(x[0].transpose(0, 1), gather) for x, gather in ((q, runs.queries), (k, runs.keys), (v, runs.keys))
    )
    q_sizes, k_sizes = [batch.q_tokens for batch in runs.batches], [batch.k_tokens for batch in runs.batches]
    groups = zip(torch.split(q_THD, q_sizes), torch.split(k_KHD, k_sizes), torch.split(v_KHD, k_sizes), strict=True)
    outs = [kernel(*tensors, batch) for tensors, batch in zip(groups, runs.batches, strict=True)]
    out_THD = outs[0] if len(outs) == 1 else torch.cat(outs)
    return gather_rows(out_THD, runs.outputs).transpose(0, 1)[None]


def _sdpa_runs(
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
        raise UserError("attention backend 'lse' cannot soft-cap logits: use 'runsplit' for this model")
    kernels: Kernels = varlen if _flash(q) else loops
    if q.is_cuda and kernels is loops:
        raise UserError(
            "attention backend 'lse' on CUDA needs fp16 or bf16 and a head size that is a multiple of 8 up to "
            f"{varlen.MAX_HEAD_SIZE}, got {q.dtype} and {q.shape[-1]}: train in bf16, or use 'runsplit'"
        )
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (q, k, v))
    out_THD = attend_lse(q_THD, k_THD, v_THD, plan.rectangles, scaling=scaling, kernels=kernels)
    return out_THD.transpose(0, 1)[None]


def slow_path_reason(device: str, dtype: torch.dtype, head_size: int, softcap: float | None = None) -> str | None:
    """Return why attention on this device cannot use flash kernels and falls back to slower ones; None if it need not.

    Only CUDA has flash kernels to fall back from.
    """
    if device != "cuda":
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention needs fp16 or bf16, not {str(dtype).removeprefix('torch.')}"
    if head_size > varlen.MAX_HEAD_SIZE or head_size % 8:
        return (
            f"flash attention needs a head size that is a multiple of 8 up to {varlen.MAX_HEAD_SIZE}, not {head_size}"
        )
    return None if softcap is None else "flash attention cannot soft-cap logits"


def _flash_fits(q: torch.Tensor) -> bool:
    """Return whether torch's variable-length flash attention supports queries [..., D]; it does not pad heads."""
    return q.is_cuda and slow_path_reason("cuda", q.dtype, q.shape[-1]) is None


def _flash(q: torch.Tensor) -> bool:
    """Return whether flash attention runs queries [..., D]. Raises UserError if its kernels compute another mask."""
    if not _flash_fits(q):
        return False
    check_flash(q.device, q.dtype)
    return True


BACKENDS: Mapping[str, Backend] = {"dense": _dense, "flex": _flex, "lse": _lse, "runsplit": _runsplit}


def choose_backend(plan: AttentionPlan, device: str, softcap: float | None = None, *, flash_fits: bool = True) -> str:
    """Return the backend that ``auto`` selects, and log the reason once.

    Args:
        plan: of the row.
        device: type of the device, ``cpu`` or ``cuda``.
        softcap: of the model's logits; flash attention has none.
        flash_fits: whether flash attention supports the queries' dtype and head size on CUDA.
    """
    mergeable = softcap is None and plan.order is None and not plan.bidirectional and (flash_fits or device != "cuda")
    if mergeable and (plan.run_split is None or (device == "cuda" and plan.gather_ratio > LSE_GATHER_RATIO)):
        name, reason = "lse", "samples hold so many media that gathering keys would cost more"
    elif device == "cuda" and softcap is not None and plan.order is None:
        name, reason = "flex", "flash attention cannot soft-cap logits"
    elif device == "cuda" and flash_fits and softcap is None:
        name, reason = "runsplit", "one variable-length flash call over gathered keys"
    else:
        name, reason = "runsplit", "one fused attention per run"
    _log_once(f"attention: {name} for policy {plan.policy.name} on {device}: {reason}")
    return name


@lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    log.info(message)


def _check(q: torch.Tensor, k: torch.Tensor, plan: AttentionPlan) -> None:
    if q.dim() != 4 or q.shape[0] != 1:
        raise UserError(
            f"a plan covers one row: queries must be [1, H, T, D], got {tuple(q.shape)}; "
            "join the rows of a micro-batch with Sidecars.concat"
        )
    if q.shape[2] != len(plan) or k.shape[2] != len(plan):
        raise UserError(
            f"the plan covers {len(plan)} tokens, but the layer has {q.shape[2]} queries and {k.shape[2]} keys: "
            "build the plan from the sidecars of the same micro-batch"
        )
    if q.shape[1] % k.shape[1]:
        raise UserError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: fix the model's config")
