"""The D-Abstractor of Honeybee (arXiv 2312.06742): the decoder of Deformable DETR (arXiv 2010.04159) on patch features.

B images, P = rows x columns patches, C feature width, N queries, E decoder width, H heads, K sampling points, D output
width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import ConfigError
from pipeline.model.connectors.base import Connector, Count, Features, Grid, Heads, Width, side_of


class DeformableAttention(nn.Module):
    """Each query samples K points near its reference point, per head, and adds them up by weight."""

    def __init__(self, width: int, *, heads: int, points: int, grid: Grid) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.rows, self.columns = grid
        self.sampling_offsets = nn.Linear(width, heads * points * 2)
        self.attention_weights = nn.Linear(width, heads * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Point k of a head starts k cells away in the head's own direction, all with equal weight."""
        angles_H = torch.arange(self.heads) * (2.0 * math.pi / self.heads)
        directions_H2 = torch.stack([angles_H.cos(), angles_H.sin()], -1)
        directions_H2 = directions_H2 / directions_H2.abs().amax(-1, keepdim=True)
        steps_K = torch.arange(1, self.points + 1)
        self.sampling_offsets.bias.copy_((directions_H2[:, None] * steps_K[None, :, None]).flatten())
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query_BNE: torch.Tensor, features_BPE: torch.Tensor, points_N2: torch.Tensor) -> torch.Tensor:
        """Return the update of the queries [B, N, E]; ``points_N2`` are the reference points (x, y) in 0..1.

        Places and samples are computed in fp32 at least: bf16 would round a place to a quarter of a patch.
        """
        batch, queries, _ = query_BNE.shape
        sizes_2 = points_N2.new_tensor([self.columns, self.rows])
        offsets = self.sampling_offsets(query_BNE).view(batch, queries, self.heads, self.points, 2)
        places = points_N2[:, None, None] + offsets.to(points_N2.dtype) / sizes_2
        weights = self.attention_weights(query_BNE).view(batch, queries, self.heads, self.points).softmax(-1)
        value = self.value_proj(features_BPE).to(points_N2.dtype).transpose(1, 2)
        value = value.reshape(batch * self.heads, -1, self.rows, self.columns)
        sampled = F.grid_sample(value, 2.0 * places.transpose(1, 2).flatten(0, 1) - 1.0, align_corners=False)
        weights = weights.transpose(1, 2).flatten(0, 1)[:, None].to(sampled.dtype)
        out_BEN = (sampled * weights).sum(-1).view(batch, -1, queries)
        return self.output_proj(out_BEN.transpose(1, 2).to(query_BNE.dtype))  # type: ignore[no-any-return]


class QueryAttention(nn.Module):
    """Self-attention of the queries; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_BNE: torch.Tensor, positions_BNE: torch.Tensor) -> torch.Tensor:
        """Return the update of the queries [B, N, E]."""
        placed = hidden_BNE + positions_BNE
        parts = self.q_proj(placed), self.k_proj(placed), self.v_proj(hidden_BNE)
        q, k, v = (torch.unflatten(part, 2, (self.heads, -1)).transpose(1, 2) for part in parts)
        out_BHNE = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out_BHNE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class DeformableLayer(nn.Module):
    """A decoder layer of Deformable DETR: self-attention, deformable attention, feed-forward, each normalised after."""

    def __init__(self, width: int, *, heads: int, points: int, ff: int, grid: Grid) -> None:
        super().__init__()
        self.self_attn = QueryAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = DeformableAttention(width, heads=heads, points=points, grid=grid)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ff), nn.ReLU(), nn.Linear(ff, width))
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        hidden_BNE: torch.Tensor,
        positions_BNE: torch.Tensor,
        features_BPE: torch.Tensor,
        points_N2: torch.Tensor,
    ) -> torch.Tensor:
        """Return the next queries [B, N, E]."""
        hidden_BNE = self.self_attn_layer_norm(hidden_BNE + self.self_attn(hidden_BNE, positions_BNE))
        update = self.encoder_attn(hidden_BNE + positions_BNE, features_BPE, points_N2)
        hidden_BNE = self.encoder_attn_layer_norm(hidden_BNE + update)
        return self.final_layer_norm(hidden_BNE + self.mlp(hidden_BNE))  # type: ignore[no-any-return]


class DeformableAbstractor(nn.Module):
    """Maps features [B, P, C] to tokens [B, side^2, D] by queries that look where they learn to look."""

    def __init__(
        self,
        width: int,
        out_width: int,
        *,
        grid: Grid,
        side: int,
        hidden: int,
        depth: int,
        heads: int,
        points: int,
        ff: int,
        pooled: str,
        positions: bool,
    ) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.side, self.pooled = side, pooled
        self.input_proj = nn.Linear(width, hidden) if width != hidden else nn.Identity()
        self.positions = nn.Parameter(torch.empty(1, self.rows * self.columns, hidden)) if positions else None
        self.queries = nn.Parameter(torch.empty(side**2, hidden if pooled != "none" else 2 * hidden))
        self.reference_points = nn.Parameter(torch.empty(side**2, 2))
        self.layers = nn.ModuleList(
            DeformableLayer(hidden, heads=heads, points=points, ff=ff, grid=grid) for _ in range(depth)
        )
        self.output_proj = nn.Linear(hidden, out_width) if hidden != out_width else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw queries and positions, and lay the reference points out as a square over the image."""
        nn.init.normal_(self.queries)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)
        down = torch.linspace(0.5, self.rows - 0.5, self.side) / self.rows
        across = torch.linspace(0.5, self.columns - 0.5, self.side) / self.columns
        y, x = torch.meshgrid(down, across, indexing="ij")
        self.reference_points.copy_(torch.stack([x, y], -1).flatten(0, 1))

    def forward(self, features_BPC: torch.Tensor) -> torch.Tensor:
        """Return image tokens, one per query."""
        features_BPE = self.input_proj(features_BPC)
        if self.positions is not None:
            features_BPE = features_BPE + self.positions
        positions_BNE, hidden_BNE = self.start(features_BPE)
        points_N2 = self.reference_points.to(torch.promote_types(features_BPC.dtype, torch.float32))
        for layer in self.layers:
            hidden_BNE = layer(hidden_BNE, positions_BNE, features_BPE, points_N2)
        return self.output_proj(hidden_BNE)  # type: ignore[no-any-return]

    def start(self, features_BPE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions and the first hidden states of the queries, each [B, N, E]."""
        learned_BNE = self.queries.expand(len(features_BPE), -1, -1)
        if self.pooled == "none":
            positions, hidden = learned_BNE.chunk(2, dim=-1)
            return positions, hidden
        map_BEHW = torch.unflatten(features_BPE.transpose(1, 2), 2, (self.rows, self.columns))
        pooled_BNE = F.adaptive_avg_pool2d(map_BEHW, (self.side, self.side)).flatten(2).transpose(1, 2)
        return (pooled_BNE, learned_BNE) if self.pooled == "query" else (learned_BNE, pooled_BNE)


class DAbstractor(Connector):
    """The D-Abstractor of Honeybee (arXiv 2312.06742): queries sample the features by deformable attention.

    Queries start as a square over the image, but each moves where it learns to look: tokens have no fixed place.
    Defaults are the published ones, but for dropout, which is 0: no training step is random.
    """

    kind: ClassVar[str] = "dabstractor"
    module: ClassVar[type[nn.Module]] = DeformableAbstractor

    queries: Width = 144
    """Tokens per image, a square number; must equal image_tokens of the packs."""
    hidden: Width = 1_024
    """Width of the decoder."""
    depth: Count = 6
    """Decoder layers."""
    heads: Heads = 8
    """Attention heads."""
    points: Count = 4
    """Points that a head samples."""
    ff: Width = 1_024
    """Feed-forward width."""
    pooled: Literal["query", "target", "none"] = "query"
    """Use of the pooled features: positions of the queries, their first states, or none."""
    positions: bool = True
    """Add a learned position embedding to the features."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of queries."""
        return self.queries

    def check(self, features: Features) -> None:
        """Refuse a number of queries that is not a square, and heads that do not divide the width."""
        side_of("queries", self.queries)
        if self.hidden % self.heads:
            raise ConfigError(f"model.connector.heads={self.heads} does not divide hidden={self.hidden}: change one")

    def fix_for(self, tokens: int) -> str:
        """Return the number of queries to set."""
        return f"set model.connector.queries to {tokens}"

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `DeformableAbstractor`."""
        names = ("hidden", "depth", "heads", "points", "ff", "pooled", "positions")
        sizes = {"grid": features.grid, "side": side_of("queries", self.queries)}
        return {
            "width": features.width,
            "out_width": out_width,
            **sizes,
            **{name: getattr(self, name) for name in names},
        }
