"""The MLP of LLaVA-1.5 (arXiv 2310.03744): one token per patch."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pipeline.model.connectors.base import Connector, Features, Grid, Layers


class MlpConnector(nn.Sequential):
    """Two linear layers with a GELU between them: [B, P, width] -> [B, P, out_width]."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


class Mlp(Connector):
    """Two linear layers per patch, as in LLaVA-1.5 (arXiv 2310.03744). One token per patch, on the tower's grid."""

    kind: ClassVar[str] = "mlp"
    module: ClassVar[type[nn.Module]] = MlpConnector

    layers: Layers = ()
    """Blocks of the tower whose outputs are read side by side, such as [-2] (LLaVA-1.5); negative = counted from the
    last; empty = the tower's output."""

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Return `layers`."""
        return self.layers

    def tokens(self, grid: Grid) -> int:
        """Return one token per patch."""
        return grid[0] * grid[1]

    def grid(self, grid: Grid) -> Grid:
        """Return the tower's grid."""
        return grid

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `MlpConnector`."""
        return {"width": features.width, "out_width": out_width}
