"""The Spatial Vision Aggregator of Cambrian-1 (arXiv 2406.16860): each query of a grid sees its window of every tower.

B images, T towers, N = side x side queries, W_k patches of a window of tower k, E hidden width, D output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import ConfigError
from pipeline.model.connectors.base import Connector, Count, Features, Grid, Heads, Width, resized


def _normed(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


class WindowAttention(nn.Module):
    """Cross-attention of one query to the windows of all towers under one softmax."""

    def __init__(self, width: int, heads: int, towers: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = _normed(width)
        self.to_k = nn.ModuleList(_normed(width) for _ in range(towers))
        self.to_v = nn.ModuleList(_normed(width) for _ in range(towers))
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, query_M1E: torch.Tensor, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the update of M = B x N queries [M, 1, E] from their windows [M, W_k, E]."""
        keys = torch.cat([to_k(window) for to_k, window in zip(self.to_k, windows, strict=True)], dim=1)
        values = torch.cat([to_v(window) for to_v, window in zip(self.to_v, windows, strict=True)], dim=1)
        parts = self.to_q(query_M1E), keys, values
        q, k, v = (torch.unflatten(part, 2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class AggregatorLayer(nn.Module):
    """One layer: the query with the global context, attention to its windows, a feed-forward."""

    def __init__(self, width: int, heads: int, windows: Sequence[int]) -> None:
        super().__init__()
        self.context = nn.Linear(width, width, bias=False)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.windows = tuple(windows)
        for tower, side in enumerate(windows):  # owned by the layer that uses them, as ZeRO-3 requires
            places = nn.Parameter(torch.empty(side**2, width)) if side > 1 else None
            self.register_parameter(f"places_{tower}", places)
        self.attention = WindowAttention(width, heads, len(windows))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings of the places inside a window."""
        for places in self.places():
            if places is not None:
                nn.init.normal_(places)

    def places(self) -> Sequence[torch.Tensor | None]:
        """Return the embedding of the places inside a window of each tower; None where a window is one patch."""
        return [getattr(self, f"places_{tower}") for tower in range(len(self.windows))]

    def forward(
        self, query_M1E: torch.Tensor, context_M1E: torch.Tensor, windows: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the next queries [M, 1, E]."""
        hidden = self.join(torch.cat([query_M1E, self.context(context_M1E)], dim=-1))
        pairs = zip(windows, self.places(), strict=True)
        placed = [window if places is None else window + places for window, places in pairs]
        hidden = self.norm(hidden + self.attention(hidden, placed))
        return self.mlp(hidden) + query_M1E  # type: ignore[no-any-return]


class SpatialAggregator(nn.Module):
    """Maps the features [B, P_k, C_k] of one or several towers to tokens [B, N, D], row by row.

    With ``newline``, a learned token follows each row: [B, side x (side + 1), D].
    """

    def __init__(
        self,
        widths: Sequence[int],
        out_width: int,
        *,
        grids: Sequence[Grid],
        side: int,
        hidden: int,
        depth: int,
        heads: int,
        newline: bool,
    ) -> None:
        super().__init__()
        self.side, self.grids = side, tuple(grids)
        self.windows = tuple(window_side(grid, side) for grid in grids)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
            for width in widths
        )
        self.query = nn.Parameter(torch.empty(hidden))
        self.layers = nn.ModuleList(AggregatorLayer(hidden, heads, self.windows) for _ in range(depth))
        self.readout = nn.Sequential(nn.Linear(hidden, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.newline = nn.Parameter(torch.empty(out_width)) if newline else None
        self.out_width = out_width
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the query and the token between rows at the scale of embeddings."""
        for drawn in (self.query, self.newline):
            if drawn is not None:
                nn.init.normal_(drawn, std=self.out_width**-0.5)

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        """Return image tokens, from the features [B, P_k, C_k] of each tower."""
        sizes = [(window * self.side, window * self.side) for window in self.windows]
        fitted = [resized(own, grid, size) for own, grid, size in zip(features, self.grids, sizes, strict=True)]
        projected = [project(own) for project, own in zip(self.projections, fitted, strict=True)]
        images, queries = len(projected[0]), self.side**2
        context_M1E = projected[0].mean(1, keepdim=True).repeat_interleave(queries, dim=0)
        windows = [self.cut(own, window) for own, window in zip(projected, self.windows, strict=True)]
        query_M1E = self.query.expand(images * queries, 1, -1)
        for layer in self.layers:
            query_M1E = layer(query_M1E, context_M1E, windows)
        tokens_BND = self.readout(query_M1E.view(images, queries, -1))
        return tokens_BND if self.newline is None else self.with_newlines(tokens_BND, self.newline)

    def cut(self, features_BPE: torch.Tensor, window: int) -> torch.Tensor:
        """Cut the grid of a tower into the windows of the queries, [B x N, W, E]."""
        map_ = torch.unflatten(features_BPE, 1, (self.side, window, self.side, window))
        return map_.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def with_newlines(self, tokens_BND: torch.Tensor, newline_D: torch.Tensor) -> torch.Tensor:
        """Return the tokens with the learned token after each row."""
        rows = torch.unflatten(tokens_BND, 1, (self.side, self.side))
        ends = newline_D.expand(len(rows), self.side, 1, -1)
        return torch.cat([rows, ends], dim=2).flatten(1, 2)


def window_side(grid: Grid, side: int) -> int:
    """Return the patches per side of a query's window: the tower's grid is resized to a multiple of the queries'."""
    return max(1, min(grid) // side)


class Sva(Connector):
    """The Spatial Vision Aggregator of Cambrian-1 (arXiv 2406.16860): each query sees its own window of every tower.

    The connector before the decoder, with one group of queries; `model.extra_vision` adds towers. A tower whose grid is
    no multiple of the queries' is interpolated to the multiple below (27 x 27 to 24 x 24). Keeps the grid without
    `newline`.
    """

    kind: ClassVar[str] = "sva"
    module: ClassVar[type[nn.Module]] = SpatialAggregator
    several_towers: ClassVar[bool] = True

    side: Width = 24
    """Queries per side."""
    hidden: Width = 1_024
    """Width of queries and windows."""
    depth: Count = 3
    """Layers."""
    heads: Heads = 16
    """Attention heads."""
    newline: bool = True
    """A learned token after each row, as published. Policies that need a grid, such as cca, need false."""
    decoder_layers: int = 0
    """Layers inside the decoder. Only 0 is supported: every pipeline stage would need the features of all towers."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of queries, and of rows with `newline`."""
        return self.side * (self.side + self.newline)

    def grid(self, grid: Grid) -> Grid | None:
        """Return the grid of queries; None with `newline`, whose tokens have no place in the image."""
        return None if self.newline else (self.side, self.side)

    def check(self, features: Features) -> None:
        """Refuse layers inside the decoder, and heads that do not divide the width."""
        if self.decoder_layers:
            raise ConfigError(
                f"model.connector.decoder_layers={self.decoder_layers} is not supported: layers inside the decoder "
                "read the features of all towers, which only the first pipeline stage holds; set it to 0"
            )
        if self.hidden % self.heads:
            raise ConfigError(f"model.connector.heads={self.heads} does not divide hidden={self.hidden}: change one")

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `SpatialAggregator`."""
        towers = [features, *features.others]
        names = ("side", "hidden", "depth", "heads", "newline")
        return {
            "widths": [tower.width for tower in towers], "out_width": out_width,
            "grids": [tower.grid for tower in towers], **{name: getattr(self, name) for name in names},
        }  # fmt: skip
