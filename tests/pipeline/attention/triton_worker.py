"""Runs the Triton gather-sum on the CPU, in Triton's interpreter, and exits with an error where it is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

import torch

from pipeline.attention import build_plan, gather
from pipeline.attention.gather_triton import sum_rows
from pipeline.attention.runs import Gather
from pipeline.masks import parse_layout

LAYOUT = "S2 V9 Q4 A5 | V9 V9 Q3 A2 Q2 A3 | Q4 A9 P10"


def backward(x: torch.Tensor, table: Gather, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    own = x.clone().requires_grad_()
    out = gather.gather_rows(own, table)
    (grad,) = torch.autograd.grad(out, own, gradient)
    return out.detach(), grad


def main() -> None:
    table = build_plan("mma", parse_layout(LAYOUT)).runs.keys
    assert table is not None and bool((torch.diff(table.offsets) > 1).any()), "some rows have several copies"
    generator = torch.Generator().manual_seed(0)
    tokens = len(table.offsets) - 1
    for shape, dtype in (((2, 8), torch.float32), ((3, 5), torch.bfloat16), ((2, 600), torch.float32)):
        x = torch.randn(tokens, *shape, generator=generator).to(dtype)
        gradient = torch.randn(len(table.rows), *shape, generator=generator).to(dtype)
        exact = backward(x.double(), table, gradient.double())
        reference, gather._sum_rows = gather._sum_rows, sum_rows
        found = backward(x, table, gradient)
        gather._sum_rows = reference
        assert torch.equal(found[0].double(), exact[0])
        bound = 1e-6 if dtype == torch.float32 else 2**-7  # one unit in the last place: the interpreter truncates
        assert found[1].dtype == dtype
        assert float(((found[1].double() - exact[1]).abs() / exact[1].abs().clamp(min=1)).max()) <= bound, (
            shape,
            dtype,
        )


if __name__ == "__main__":
    main()
