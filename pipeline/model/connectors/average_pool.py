"""The connector of Gemma 3 (arXiv 2503.19786): windows of patches are averaged, normalised and projected.

B images, P patches, C feature width, N tokens, D output width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import ConfigError
from pipeline.model.connectors.base import Connector, Features, Grid


class SoftTokenNorm(nn.Module):
    """Gemma's RMSNorm: computed in fp32 at least, scaled by 1 + weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """Start as a plain normalisation."""
        nn.init.zeros_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return normalised features of the same shape and dtype."""
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(wide.dtype))).type_as(features)


class AveragePoolConnector(nn.Module):
    """Maps features [B, P, C] to tokens [B, N, D]: mean of each window, RMSNorm, one matrix."""

    def __init__(self, width: int, out_width: int, *, grid: Grid, window: int, eps: float) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        self.norm = SoftTokenNorm(width, eps)
        self.weight = nn.Parameter(torch.empty(width, out_width))
        """[C, D], as Gemma 3 stores it."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrix so that tokens keep the scale of the normalised features."""
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(self.weight.shape[0]))

    def forward(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return image tokens, row by row."""
        map_BCHW = torch.unflatten(features_BPC.transpose(1, 2), 2, self.grid)
        pooled_BNC = F.avg_pool2d(map_BCHW, self.window).flatten(2).transpose(1, 2)
        return torch.matmul(self.norm(pooled_BNC), self.weight)


class AveragePool(Connector):
    """The average pooling of Gemma 3 (arXiv 2503.19786): one token per window of patches. Keeps the grid."""

    kind: ClassVar[str] = "average_pool"
    module: ClassVar[type[nn.Module]] = AveragePoolConnector

    window: Annotated[int, Field(gt=0, le=64)] = 4
    """Patches per side of a window; must divide the tower's grid."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Added to the mean square before its root."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of windows."""
        rows, columns = self.grid(grid)
        return rows * columns

    def grid(self, grid: Grid) -> Grid:
        """Return the grid of windows."""
        return grid[0] // self.window, grid[1] // self.window

    def check(self, features: Features) -> None:
        """Refuse a window that does not divide the grid."""
        rows, columns = features.grid
        if rows % self.window or columns % self.window:
            raise ConfigError(
                f"model.connector.window={self.window} does not divide the tower's {rows} x {columns} patches: "
                "set another window"
            )

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `AveragePoolConnector`."""
        own = {"grid": features.grid, "window": self.window, "eps": self.eps}
        return {"width": features.width, "out_width": out_width, **own}
