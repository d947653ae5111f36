"""Chunked cross-entropy against the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.loss import LMHead, linear_cross_entropy, token_scores

N, D, V = 37, 12, 50


def draw(rows: int = N, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return h, w, torch.randint(0, V, (rows,), generator=generator)


def naive(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, y, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("chunk", [1, 7, N - 1, N, N + 5, None])
def test_every_chunking_equals_the_naive_loss_and_gradients(
    chunk: int | None, scale: float, softcap: float | None
) -> None:
    h, w, y = draw()
    mine = linear_cross_entropy(h, w, y, scale=scale, softcap=softcap, chunk_rows=chunk)
    mine_h, mine_w = torch.autograd.grad(3.0 * mine, (h, w))
    slow = naive(h, w, y, scale, softcap)
    slow_h, slow_w = torch.autograd.grad(3.0 * slow, (h, w))
    assert torch.allclose(mine, slow, rtol=1e-12, atol=0)
    assert torch.allclose(mine_h, slow_h, rtol=1e-9, atol=1e-12)
    assert torch.allclose(mine_w, slow_w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["h", "w"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    h, w, y = draw()
    (h if frozen == "h" else w).requires_grad_(False)
    linear_cross_entropy(h, w, y, chunk_rows=5).backward()
    assert (h.grad is None) == (frozen == "h") and (w.grad is None) == (frozen == "w")


def test_no_rows_give_an_exact_zero_that_reaches_both_inputs() -> None:
    h, w, y = draw(0)
    loss = linear_cross_entropy(h, w, y)
    loss.backward()
    assert loss.item() == 0.0
    assert h.grad is not None and h.grad.shape == (0, D)
    assert w.grad is not None and not w.grad.any()


def test_bf16_accumulates_in_fp32() -> None:
    h, w, y = draw(400, torch.bfloat16)
    loss = linear_cross_entropy(h, w, y, chunk_rows=3)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, w)
    exact_h, exact_w = h.detach().double(), w.detach().double().requires_grad_()
    exact = naive(exact_h, exact_w, y, 1.0, None)
    (wanted,) = torch.autograd.grad(exact, exact_w)
    assert abs(loss.double() - exact) <= 2e-3 * exact
    assert (grad.double() - wanted).norm() <= 1e-2 * wanted.norm()


def test_inference_makes_no_gradients() -> None:
    h, w, y = draw()
    with torch.no_grad():
        loss = linear_cross_entropy(h, w, y)
    assert not loss.requires_grad


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("rows", [64, 640])
def test_memory_does_not_grow_with_rows_times_vocabulary(rows: int) -> None:
    h, w, y = draw(rows)
    with LargestTensor() as largest:
        linear_cross_entropy(h, w, y, chunk_rows=8).backward()
    assert largest.elements == max(V * D, 8 * V, rows * D)


def test_a_second_backward_is_refused() -> None:
    h, w, y = draw()
    loss = linear_cross_entropy(h, w, y)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated twice"):
        loss.backward()


def test_the_loss_is_computed_from_the_returned_logits() -> None:
    head = LMHead(D, V, scale=0.5, softcap=4.0).double()
    h, _, y = draw()
    assert torch.allclose(F.cross_entropy(head.logits(h), y, reduction="sum"), head(h, y), rtol=1e-12)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_scores_of_tokens_are_loss_and_hit(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(5)
    h, w = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (7, V))
    labels = torch.randint(V, (7,), generator=generator)
    logits = 0.5 * h @ w.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    labels[:3] = logits[:3].argmax(-1)
    scores = token_scores(h, w, labels, scale=0.5, softcap=softcap, chunk_rows=2)
    assert torch.allclose(scores[:, 0], torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert scores[:, 1].tolist() == (logits.argmax(-1) == labels).double().tolist()
    assert torch.allclose(scores[:, 0].sum(), linear_cross_entropy(h, w, labels, scale=0.5, softcap=softcap))
    assert token_scores(h[:0], w, labels[:0]).shape == (0, 2)
