"""The CUDA path on the CPU: a reference kernel replaces the flash operators; everything above them is the real code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import varlen as torch_varlen

from data_prep.common.errors import UserError
from pipeline.attention import build_plan, varlen
from pipeline.attention.backends import runsplit
from pipeline.attention.lse import attend_lse
from pipeline.attention.runs import VarlenBatch
from pipeline.attention.self_check import HEAD_SIZE, check_alignment, check_flash
from pipeline.masks import POLICIES, Sidecars, get_policy, parse_layout
from tests.pipeline.attention.tensors import Inputs, distance
from tests.pipeline.masks.rows import GRID, rows


def _logits(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    hidden = ~torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return logits.masked_fill(hidden, float("-inf")) if causal else logits


def _bounds(cu_q: torch.Tensor, cu_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    edges = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return ((slice(a, b), slice(c, d)) for a, b, c, d in edges)


def reference_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, is_causal: bool = False, scale: float | None = None, *rest: Any, **more: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for a, b in _bounds(cu_seq_q, cu_seq_k):
        logits = _logits(query[a], key[b], is_causal, scale)
        v = value[b].repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[a] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)
        lse[:, a] = logits.logsumexp(-1)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def reference_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int, is_causal: bool,
    rng_state: torch.Tensor, scale: float | None = None, *rest: Any, **more: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The textbook backward from the *given* output and log-sum-exp, as flash computes it."""
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    delta = (grad_out * out).sum(-1).T
    for a, b in _bounds(cu_seq_q, cu_seq_k):
        weights = (_logits(query[a], key[b], is_causal, scale) - lse[:, a, None]).exp()
        k, v = (x[b].repeat_interleave(groups, 1) for x in (key, value))
        slopes = weights * (torch.einsum("qhd,khd->hqk", grad_out[a], v) - delta[:, a, None]) * scale
        dq[a] = torch.einsum("hqk,khd->qhd", slopes, k)
        dk[b] = torch.einsum("hqk,qhd->khd", slopes, query[a]).unflatten(1, (-1, groups)).sum(2)
        dv[b] = torch.einsum("hqk,qhd->khd", weights, grad_out[a]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.fixture(scope="module", autouse=True)
def flash_on_the_cpu() -> None:
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", reference_forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", reference_backward)


def worst(found: torch.Tensor, inputs: Inputs, row: Sidecars, exact: list[torch.Tensor]) -> float:
    real = row.segment > 0
    results = [found.detach(), *torch.autograd.grad(found, (inputs.q, inputs.k, inputs.v), inputs.gradient)]
    return max(distance(a[:, :, real], b[:, :, real]) for a, b in zip(results, exact, strict=True))


@pytest.mark.parametrize("name", POLICIES)
@given(row=rows)
@settings(max_examples=10, deadline=None)
def test_one_flash_call_per_batch_is_exact(name: str, row: Sidecars) -> None:
    plan, inputs = build_plan(get_policy(name, allow_leak=True, grid=GRID), row), Inputs.draw(row)
    out = runsplit(inputs.q, inputs.k, inputs.v, plan.runs, partial(varlen.attend_varlen, scaling=0.3))
    assert worst(out, inputs, row, inputs.results(plan, "dense", scaling=0.3)) <= 1e-12


def attn_of_torch_2_10(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, is_causal: bool = False, return_aux: Any = None,
) -> torch.Tensor:  # fmt: skip
    return reference_forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)[0]


def attn_of_torch_2_13(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return reference_forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), scale)[0]


@pytest.mark.parametrize("attn", [attn_of_torch_2_10, attn_of_torch_2_13])
@pytest.mark.parametrize("name", ["mma", "mixed"])
def test_the_call_suits_the_signature_of_each_torch(name: str, attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older releases have no scale and say is_causal, newer ones a window; causal is aligned bottom-right in both."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", attn)
    monkeypatch.setattr(varlen, "_PARAMETERS", frozenset(inspect.signature(attn).parameters))
    row = parse_layout("S2 V9 Q4 A5 | V9 V9 Q3 A2 Q2 A3 | Q4 A9 P10")
    plan, inputs = build_plan(name, row), Inputs.draw(row, (4, 2))
    out = runsplit(inputs.q, inputs.k, inputs.v, plan.runs, partial(varlen.attend_varlen, scaling=0.3))
    assert worst(out, inputs, row, inputs.results(plan, "dense", scaling=0.3)) <= 1e-12


@pytest.mark.parametrize("name", ["causal", "mma", "mma_general", "image_to_answer"])
@given(row=rows)
@settings(max_examples=10, deadline=None)
def test_merged_flash_calls_are_exact(name: str, row: Sidecars) -> None:
    plan, inputs = build_plan(get_policy(name, allow_leak=True), row), Inputs.draw(row)
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    out_THD = attend_lse(q_THD, k_THD, v_THD, plan.rectangles, scaling=0.3, kernels=varlen)
    out = out_THD.transpose(0, 1)[None]
    assert worst(out, inputs, row, inputs.results(plan, "dense", scaling=0.3)) <= 1e-12


def test_the_self_check_passes_a_right_kernel_and_refuses_one_aligned_top_left() -> None:
    def top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: VarlenBatch) -> torch.Tensor:
        outs = []
        for a, b in _bounds(batch.cu_q, batch.cu_k):
            logits = torch.einsum("qhd,khd->hqk", q[a], k[b]) * HEAD_SIZE**-0.5
            seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
            outs.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, float("-inf")).softmax(-1), v[b]))
        return torch.cat(outs)

    check_flash(torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"on cpu gives wrong results \(off by .*align causal masks top-left"):
        check_alignment(top_left, torch.device("cpu"), torch.float32)
