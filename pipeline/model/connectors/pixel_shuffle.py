"""The pixel shuffle of InternVL (arXiv 2312.14238, 2404.16821) and Idefics 3 (arXiv 2408.12637).

Neighbouring patches become channels of one token.

B images, C feature width, f factor, D output width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.config.schema import ConfigError
from pipeline.model.connectors.base import Connector, Features, Grid, resized


class PixelShuffleConnector(nn.Module):
    """Maps features [B, P, C] to tokens [B, P / f^2, D]: f x f patches side by side, LayerNorm, two linear layers.

    With ``projection="linear"`` one linear layer without bias takes the place of these three.
    """

    def __init__(
        self, width: int, out_width: int, *, grid: Grid, fitted: Grid, factor: int, projection: str = "mlp"
    ) -> None:
        super().__init__()
        self.grid, self.fitted, self.factor = grid, fitted, factor
        wide = width * factor**2
        if projection == "linear":
            self.mlp = nn.Sequential(nn.Linear(wide, out_width, bias=False))
            return
        self.mlp = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, out_width), nn.GELU(), nn.Linear(out_width, out_width)
        )

    def forward(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return image tokens, row by row."""
        features_BPC = resized(features_BPC, self.grid, self.fitted)
        return self.mlp(self.shuffle(features_BPC))  # type: ignore[no-any-return]

    def shuffle(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return [B, P / f^2, C * f^2]; channels are ordered by row, then by column within the f x f patches."""
        (rows, columns), f = self.fitted, self.factor
        map_ = torch.unflatten(features_BPC, 1, (rows // f, f, columns // f, f))
        return map_.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class PixelShuffle(Connector):
    """The pixel shuffle of InternVL (arXiv 2312.14238): factor x factor patches become one token. Keeps the grid."""

    kind: ClassVar[str] = "pixel_shuffle"
    module: ClassVar[type[nn.Module]] = PixelShuffleConnector

    factor: Annotated[int, Field(gt=0, le=64)] = 2
    """Patches per side that become one token; InternVL's scale is 1 / factor."""
    projection: Literal["mlp", "linear"] = "mlp"
    """mlp: LayerNorm and two linear layers (InternVL); linear: one linear layer without bias (Idefics 3, SmolVLM)."""
    resize: bool = False
    """Interpolate features to the next grid that the factor divides (27 x 27 to 28 x 28); false = refuse such grids."""

    def tokens(self, grid: Grid) -> int:
        """Return the tokens of the shuffled grid."""
        rows, columns = self.grid(grid)
        return rows * columns

    def grid(self, grid: Grid) -> Grid:
        """Return the grid of tokens."""
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    def check(self, features: Features) -> None:
        """Refuse a grid that the factor does not divide, unless it is resized."""
        rows, columns = features.grid
        if (rows % self.factor or columns % self.factor) and not self.resize:
            raise ConfigError(
                f"model.connector.factor={self.factor} does not divide the tower's {rows} x {columns} patches: "
                "set model.connector.resize to true, or another factor"
            )

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `PixelShuffleConnector`."""
        rows, columns = self.grid(features.grid)
        fitted = rows * self.factor, columns * self.factor
        sizes = {"grid": features.grid, "fitted": fitted, "factor": self.factor, "projection": self.projection}
        return {"width": features.width, "out_width": out_width, **sizes}
