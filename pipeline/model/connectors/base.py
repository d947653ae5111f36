"""What every connector is: options of a recipe, the number of tokens and their grid, and a torch module.

B images, P patches, N image tokens, C feature width of the vision tower, D hidden width of the language model.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.schema import ConfigError, Section

Count = Annotated[int, Field(gt=0, le=256)]
"""A number of layers, or a factor. Limits reject typos and hostile files; each is far above any published model."""
Heads = Annotated[int, Field(gt=0, le=1_024)]
"""A number of attention heads."""
Layers = tuple[Annotated[int, Field(ge=-1_024, lt=1_024)], ...]
"""Blocks of a tower."""
Width = Annotated[int, Field(gt=0, le=65_536)]
"""A width, or a number of tokens."""

Grid = tuple[int, int]
"""(rows, columns)."""


class Features(NamedTuple):
    """The patch features of the vision tower, and of further towers where a connector reads several."""

    width: int
    grid: Grid
    others: tuple[Features, ...] = ()

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]


class NormedConnector(nn.Module):
    """A connector and a LayerNorm of its tokens (arXiv 2512.08374)."""

    def __init__(self, connector: nn.Module, width: int) -> None:
        super().__init__()
        self.connector = connector
        self.norm = nn.LayerNorm(width)

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        """Return the normalised tokens [B, N, D]."""
        return self.norm(self.connector(*features))  # type: ignore[no-any-return]


class Connector(Section):
    """The options of one kind of connector, and what follows from them.

    A subclass is one file: its fields are keys of ``model.connector``, with their help below them; `kind` names it in
    recipes; `module` is the torch module. The module needs nothing but torch and its arguments, which are JSON-ready,
    so it also runs outside this project.
    """

    kind: ClassVar[str]
    """Value of ``model.connector.kind``."""
    module: ClassVar[type[nn.Module]]
    """Maps features [B, P, C] to image tokens [B, N, D]; several towers are several arguments. A module sets its own
    parameters in ``reset_parameters``, and uses them in its own ``forward`` only, as ZeRO-3 requires."""
    several_towers: ClassVar[bool] = False
    """Whether it reads the features of `model.extra_vision` as well."""

    norm: bool = False
    """Normalise the image tokens (LayerNorm), starting at the scale of the text embeddings (arXiv 2512.08374)."""

    def tokens(self, grid: Grid) -> int:
        """Return the tokens of one image whose patches form ``grid``."""
        raise NotImplementedError

    def grid(self, grid: Grid) -> Grid | None:
        """Return the (rows, columns) of the image tokens; None, the default, when tokens have no place in the image."""
        return None

    def check(self, features: Features) -> None:
        """Check the options against the tower. Raises ConfigError naming the key and the fix."""

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Blocks of the tower whose outputs it reads, side by side; empty = the tower's output."""
        return ()

    def fix_for(self, tokens: int) -> str:
        """Return what to set for ``tokens`` tokens an image, as the advice of an error message."""
        return f"use model.connector.kind=perceiver with model.connector.latents={tokens}"

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `module`, JSON-ready."""
        raise NotImplementedError

    def build(self, features: Features, out_width: int) -> nn.Module:
        """Build the module from features to tokens of ``out_width``. Raises ConfigError as `check` does."""
        self.check(features)
        module = self.module(**self.arguments(features, out_width))
        return NormedConnector(module, out_width) if self.norm else module

    def flops(self, features: Features, out_width: int) -> float:
        """Return the FLOPs of a forward pass of one image, counted on the meta device: every product counts 2."""
        with torch.device("meta"):
            module = self.build(features, out_width).requires_grad_(False)
            inputs = [torch.empty(1, own.patches, own.width) for own in (features, *features.others)]
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        return float(counter.get_total_flops())

    def to_dict(self) -> dict[str, Any]:
        """Return kind and options as JSON-ready values."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


def side_of(option: str, tokens: int) -> int:
    """Return the side of a square of ``tokens``. Raises ConfigError naming the option."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ConfigError(
            f"model.connector.{option}={tokens} is not a square number: set it to {side**2} or {(side + 1) ** 2}"
        )
    return side


def resized(features_BPC: torch.Tensor, grid: Grid, to: Grid) -> torch.Tensor:
    """Interpolate features bilinearly from one grid to another, in fp32 at least."""
    if tuple(grid) == tuple(to):
        return features_BPC
    map_BCHW = torch.unflatten(features_BPC.transpose(1, 2), 2, grid)
    wide = map_BCHW.to(torch.promote_types(map_BCHW.dtype, torch.float32))
    map_BCHW = F.interpolate(wide, to, mode="bilinear", align_corners=False)
    return map_BCHW.flatten(2).transpose(1, 2).to(features_BPC.dtype)
