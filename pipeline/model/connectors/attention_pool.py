"""The attention pooling of Molmo (arXiv 2409.17146) and Molmo 2: the mean of a window of patches attends to them.

B images, P = rows x columns patches, N windows, W patches of a window, C feature width, H heads, D output width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import ConfigError
from pipeline.model.connectors.base import Connector, Features, Grid, Heads, Layers, Width


class AttentionPool(nn.Module):
    """Maps features [B, P, C] to one token per window, [B, N, D]; windows past the edge hold fewer patches."""

    def __init__(
        self, width: int, out_width: int, *, grid: Grid, window: int, heads: int, head_dim: int, hidden: int
    ) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.window, self.heads = window, heads
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.Linear(inner, inner)
        self.gate = nn.Linear(inner, hidden, bias=False)
        self.up = nn.Linear(inner, hidden, bias=False)
        self.down = nn.Linear(hidden, out_width, bias=False)

    def forward(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return image tokens, row by row."""
        windows_BNWC = self.windows(features_BPC)
        valid_1NW1 = self.windows(torch.ones_like(features_BPC[:1, :, :1]))
        mean_BN1C = windows_BNWC.sum(2, keepdim=True) / valid_1NW1.sum(2, keepdim=True)
        pooled_BND = self.attend(mean_BN1C, windows_BNWC, valid_1NW1.squeeze(3) > 0)
        return self.down(F.silu(self.gate(pooled_BND)) * self.up(pooled_BND))  # type: ignore[no-any-return]

    def windows(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Cut the grid into windows [B, N, W, C]; zeros around the image fill those at its edges."""
        map_ = torch.unflatten(features_BPC, 1, (self.rows, self.columns))
        high, wide = -self.rows % self.window, -self.columns % self.window
        map_ = F.pad(map_, (0, 0, wide // 2, wide - wide // 2, high // 2, high - high // 2))
        map_ = torch.unflatten(torch.unflatten(map_, 2, (-1, self.window)), 1, (-1, self.window))
        return map_.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def attend(self, query_BN1C: torch.Tensor, windows_BNWC: torch.Tensor, valid_1NW: torch.Tensor) -> torch.Tensor:
        """Return the pooled features [B, N, inner]; a query sees the valid patches of its own window."""
        q, k, v = self.to_q(query_BN1C), self.to_k(windows_BNWC), self.to_v(windows_BNWC)
        q, k, v = (torch.unflatten(x.flatten(0, 1), 2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        seen = valid_1NW.expand(len(query_BN1C), -1, -1).flatten(0, 1)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(1)
        return self.to_out(torch.unflatten(out, 0, query_BN1C.shape[:2]))  # type: ignore[no-any-return]


class AttentionPooling(Connector):
    """The attention pooling of Molmo (arXiv 2409.17146): one token per window of patches. Keeps the grid, of any size.

    Molmo reads two blocks of its tower: see `layers`. Windows at the edges of a grid that the window does not divide
    hold fewer patches.
    """

    kind: ClassVar[str] = "attention_pool"
    module: ClassVar[type[nn.Module]] = AttentionPool

    window: Annotated[int, Field(gt=0, le=64)] = 2
    """Patches per side of a window."""
    heads: Heads = 16
    """Attention heads."""
    layers: Layers = ()
    """Blocks of the tower whose outputs are read side by side, such as [24, 18] (Molmo 2); negative = counted
    from the last; empty = the tower's output."""
    hidden: Width = 18_944
    """Width of the gated projector; Molmo 2 takes the feed-forward width of its decoder."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of windows."""
        rows, columns = self.grid(grid)
        return rows * columns

    def grid(self, grid: Grid) -> Grid:
        """Return the grid of windows."""
        return -(-grid[0] // self.window), -(-grid[1] // self.window)

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Return `layers`."""
        return self.layers

    def inner(self, features: Features) -> int:
        """Return the width of the attention: that of one block of the tower."""
        return features.width // max(1, len(self.layers))

    def check(self, features: Features) -> None:
        """Refuse heads that do not divide the width."""
        width = self.inner(features)
        if width % self.heads:
            raise ConfigError(
                f"model.connector.heads={self.heads} does not divide the tower's width {width}: change it"
            )

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `AttentionPool`."""
        sizes = {"window": self.window, "heads": self.heads, "head_dim": self.inner(features) // self.heads}
        return {
            "width": features.width, "out_width": out_width, "grid": features.grid, **sizes, "hidden": self.hidden
        }  # fmt: skip
