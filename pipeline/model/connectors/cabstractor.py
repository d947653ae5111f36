"""The C-Abstractor of Honeybee (arXiv 2312.06742): convolutions, pooling to a square of tokens, convolutions.

B images, P = rows x columns patches, C feature width, H hidden width, N = side x side tokens, D output width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from pipeline.model.connectors.base import Connector, Count, Features, Grid, Width, side_of


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the normalised map."""
        normed_BHWC: torch.Tensor = super().forward(map_BCHW.permute(0, 2, 3, 1))
        return normed_BHWC.permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the mean of the whole map (arXiv 1709.01507)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the scaled map [B, C, h, w]."""
        gate = self.expand(F.silu(self.reduce(map_BCHW.mean((2, 3), keepdim=True))))
        return map_BCHW * gate.sigmoid()  # type: ignore[no-any-return]


class RegNetBlock(nn.Module):
    """A RegNetY block (arXiv 2003.13678) as Honeybee builds it: stride 1, no bottleneck, depthwise 3 x 3."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out_width, 1, bias=False)
        self.norm1 = ChannelNorm(out_width, eps=1e-6)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width, bias=False)
        self.norm2 = ChannelNorm(out_width, eps=1e-6)
        self.gate = SqueezeExcite(out_width, max(1, round(width / 4)))
        self.conv3 = nn.Conv2d(out_width, out_width, 1, bias=False)
        self.norm3 = ChannelNorm(out_width, eps=1e-6)
        self.shortcut: nn.Module = nn.Identity()
        if width != out_width:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out_width, 1, bias=False), ChannelNorm(out_width, eps=1e-6))

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """Return a map of ``out_width`` channels from one of ``width``."""
        out = F.silu(self.norm1(self.conv1(map_BCHW)))
        out = self.gate(F.silu(self.norm2(self.conv2(out))))
        return F.silu(self.norm3(self.conv3(out)) + self.shortcut(map_BCHW))


class ConvAbstractor(nn.Module):
    """Maps features [B, P, C] to tokens [B, side^2, D] that keep their place in the image."""

    def __init__(
        self,
        width: int,
        out_width: int,
        *,
        grid: Grid,
        side: int,
        hidden: int,
        depth: int,
        mlp_depth: int,
        positions: bool,
        prenorm: bool,
    ) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.side = side
        self.prenorm = nn.LayerNorm(width, eps=1e-6) if prenorm else None
        self.positions = nn.Parameter(torch.empty(1, self.rows * self.columns, width)) if positions else None
        self.before = nn.Sequential(*(RegNetBlock(hidden if i else width, hidden) for i in range(depth)))
        self.after = nn.Sequential(*(RegNetBlock(hidden, hidden) for _ in range(depth)))
        widths = [hidden if depth else width] + [out_width] * mlp_depth
        parts = [part for pair in pairwise(widths) for part in (nn.SiLU(), nn.Linear(*pair))]
        self.readout = nn.Sequential(*parts[1:])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position embedding."""
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return image tokens [B, side^2, D], row by row."""
        if self.prenorm is not None:
            features_BPC = self.prenorm(features_BPC)
        if self.positions is not None:
            features_BPC = features_BPC + self.positions
        map_BCHW = torch.unflatten(features_BPC.transpose(1, 2), 2, (self.rows, self.columns))
        map_BCHW = F.adaptive_avg_pool2d(self.before(map_BCHW), (self.side, self.side))
        return self.readout(self.after(map_BCHW).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class CAbstractor(Connector):
    """The C-Abstractor of Honeybee (arXiv 2312.06742): convolutions around an average pooling. Keeps a square grid.

    Defaults are the published ones; weights start as torch's layers do, the position embedding from a truncated normal
    of 0.02.
    """

    kind: ClassVar[str] = "cabstractor"
    module: ClassVar[type[nn.Module]] = ConvAbstractor

    queries: Width = 144
    """Tokens per image, a square number; must equal image_tokens of the packs."""
    hidden: Width = 1_024
    """Channels of the convolutions."""
    depth: Annotated[int, Field(ge=0, le=64)] = 3
    """RegNet blocks before the pooling, and as many after it; 0 = pooling alone."""
    mlp_depth: Count = 2
    """Linear layers of the readout."""
    positions: bool = True
    """Add a learned position embedding to the features."""
    prenorm: bool = False
    """Normalise the features first."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of queries."""
        return self.queries

    def grid(self, grid: Grid) -> Grid:
        """Return the square of the queries."""
        side = side_of("queries", self.queries)
        return side, side

    def check(self, features: Features) -> None:
        """Refuse a number of queries that is not a square."""
        side_of("queries", self.queries)

    def fix_for(self, tokens: int) -> str:
        """Return the number of queries to set."""
        return f"set model.connector.queries to {tokens}"

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `ConvAbstractor`."""
        options = {name: getattr(self, name) for name in ("hidden", "depth", "mlp_depth", "positions", "prenorm")}
        side, _ = self.grid(features.grid)
        return {"width": features.width, "out_width": out_width, "grid": features.grid, "side": side, **options}
