"""Random attention inputs, and backends compared with dense float64 attention on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.attention import AttentionPlan, attend, build_plan
from pipeline.masks import Policy, Sidecars


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def draw(
        cls, row: Sidecars, heads: tuple[int, int] = (4, 2), size: int = 8, dtype: torch.dtype = torch.float64
    ) -> Inputs:
        """Leaves [1, H, T, size]; the gradient of the output is zero in padding, whose outputs mean nothing."""
        generator = torch.Generator().manual_seed(0)

        def leaf(count: int) -> torch.Tensor:
            values = torch.randn(1, len(row), count, size, generator=generator, dtype=torch.float64)
            return values.transpose(1, 2).to(dtype).requires_grad_()

        gradient = leaf(heads[0]).detach() * (row.segment > 0)[:, None]
        return cls(leaf(heads[0]), leaf(heads[1]), leaf(heads[1]), gradient)

    def to(self, dtype: torch.dtype) -> Inputs:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.gradient.to(dtype))

    def results(self, plan: AttentionPlan, backend: str, **options: float) -> list[torch.Tensor]:
        """Output and gradients of q, k and v."""
        out = attend(self.q, self.k, self.v, plan, backend=backend, **options)
        return [out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.gradient)]


def errors(policy: Policy | str, row: Sidecars, backend: str, inputs: Inputs, **options: float) -> list[float]:
    """Relative errors of out, dq, dk and dv against the dense mask in float64, padding excluded."""
    plan, real = build_plan(policy, row), row.segment > 0
    found = inputs.results(plan, backend, **options)
    exact = inputs.to(torch.float64).results(plan, "dense", **options)
    pairs = ((a.double()[:, :, real], b[:, :, real]) for a, b in zip(found, exact, strict=True))
    return [distance(a, b) for a, b in pairs]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over that of b, or over 1 where b is smaller (a lone token's dq is exactly 0)."""
    return float((a - b).norm() / b.norm().clamp_min(1.0))
