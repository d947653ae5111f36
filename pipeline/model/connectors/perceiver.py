"""The Perceiver resampler of Flamingo (arXiv 2204.14198), as in AKI.

B images, P patches, N latents, D feature width, H heads.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from pipeline.model.connectors.base import Connector, Count, Features, Grid, Heads, Width


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves; no biases (Flamingo, arXiv 2204.14198)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, features_BPD: torch.Tensor, latents_BND: torch.Tensor) -> torch.Tensor:
        """Return the update of the latents [B, N, D], from features [B, P, D] and latents [B, N, D]."""
        latents_BND = self.norm_latents(latents_BND)
        keys_BKD = torch.cat([self.norm_features(features_BPD), latents_BND], dim=1)
        q, k, v = (self._split(x) for x in (self.to_q(latents_BND), *self.to_kv(keys_BKD).chunk(2, dim=-1)))
        out_BHNE = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out_BHNE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class PerceiverBlock(nn.Module):
    """Attention and feed-forward, each with a residual connection."""

    def __init__(self, width: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        hidden = ff_mult * width
        self.attention = PerceiverAttention(width, heads, head_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, features_BPD: torch.Tensor, latents_BND: torch.Tensor) -> torch.Tensor:
        """Return the next latents [B, N, D], from features [B, P, D] and latents [B, N, D]."""
        latents_BND = latents_BND + self.attention(features_BPD, latents_BND)
        return latents_BND + self.feed_forward(latents_BND)  # type: ignore[no-any-return]


class PerceiverResampler(nn.Module):
    """Learned queries condense any number of patches into a fixed number of tokens (arXiv 2204.14198; as in AKI)."""

    def __init__(
        self, width: int, out_width: int, *, latents: int, depth: int, heads: int, head_dim: int, ff_mult: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.blocks = nn.ModuleList(PerceiverBlock(width, heads, head_dim, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, out_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the latents; sub-modules initialise their own weights."""
        nn.init.normal_(self.latents)

    def forward(self, features_BPD: torch.Tensor) -> torch.Tensor:
        """Return image tokens [B, latents, out_width] of features [B, P, width]."""
        latents_BND = self.latents.expand(len(features_BPD), -1, -1)
        for block in self.blocks:
            latents_BND = block(features_BPD, latents_BND)
        return self.projection(self.norm(latents_BND))  # type: ignore[no-any-return]


class Perceiver(Connector):
    """A Perceiver resampler (arXiv 2204.14198), the connector of AKI. Its tokens have no place in the image."""

    kind: ClassVar[str] = "perceiver"
    module: ClassVar[type[nn.Module]] = PerceiverResampler

    latents: Width = 144
    """Tokens per image; must equal image_tokens of the packs."""
    depth: Count = 6
    """Number of blocks."""
    heads: Heads = 8
    """Attention heads."""
    head_dim: Annotated[int, Field(gt=0, le=4_096)] = 64
    """Dimension of each attention head."""
    ff_mult: Count = 4
    """Feed-forward width, as a multiple of the feature width."""

    def tokens(self, grid: Grid) -> int:
        """Return the number of latents."""
        return self.latents

    def fix_for(self, tokens: int) -> str:
        """Return the number of latents to set."""
        return f"set model.connector.latents to {tokens}"

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `PerceiverResampler`."""
        options = {name: getattr(self, name) for name in ("latents", "depth", "heads", "head_dim", "ff_mult")}
        return {"width": features.width, "out_width": out_width, **options}
