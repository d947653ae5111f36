"""On a GPU: every backend in bf16 against dense float64, and the same gradients every time."""

from __future__ import annotations

import pytest
import torch

from pipeline.attention import build_plan
from pipeline.attention.gather import gather_rows
from pipeline.masks import get_policy, parse_layout
from tests.pipeline.attention.tensors import Inputs, distance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYOUT = "S4 V144 Q40 A50 | V144 V144 Q30 A9 Q20 A30 | Q40 A90 P100"


@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *[(name, "runsplit") for name in ("causal", "mma", "mma_general", "mixed", "mma_mixed", "prefix", "cca")],
        *[(name, "lse") for name in ("causal", "mma", "mma_general")],
        *[(name, "flex") for name in ("mma", "mixed")],
    ],
)
def test_backends_on_the_gpu(name: str, backend: str, heads: tuple[int, int], size: int) -> None:
    if size % 8 and backend != "runsplit":
        pytest.skip("not a size of its kernel")
    row = parse_layout(LAYOUT)
    real = (row.segment > 0).cuda()
    drawn = Inputs.draw(row, heads, size, torch.bfloat16)
    q, k, v = (x.detach().cuda().requires_grad_() for x in (drawn.q, drawn.k, drawn.v))
    inputs = Inputs(q, k, v, drawn.gradient.cuda())
    plan = build_plan(get_policy(name, grid=(12, 12)), row).to("cuda")
    found, exact = inputs.results(plan, backend), inputs.to(torch.float64).results(plan, "dense")
    assert max(distance(a.double()[:, :, real], b[:, :, real]) for a, b in zip(found, exact, strict=True)) <= 2e-2


def test_an_expanded_gradient_is_summed_like_a_dense_one() -> None:
    """The gradient of a sum is one expanded scalar."""
    gather = build_plan("mma", parse_layout(LAYOUT)).to("cuda").runs.keys
    assert gather is not None
    tokens = int(gather.offsets.numel()) - 1
    x = torch.randn(tokens, 2, 64, device="cuda", requires_grad=True)
    gather_rows(x, gather).sum().backward()
    gather_ratio = torch.bincount(gather.rows, minlength=tokens).float()
    assert x.grad is not None and torch.equal(x.grad, gather_ratio[:, None, None].expand_as(x))
