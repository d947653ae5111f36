"""What every connector is: options of a recipe, the number of tokens and their grid, and a torch module.

B images, P patches, N image tokens, C feature width of the vision tower, D hidden width of the language model.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.schema import Section

Count = Annotated[int, Field(gt=0, le=256)]
"""A number of layers, or a factor. Limits reject typos and hostile files; each is far above any published model."""
Heads = Annotated[int, Field(gt=0, le=1_024)]
"""A number of attention heads."""
Width = Annotated[int, Field(gt=0, le=65_536)]
"""A width, or a number of tokens."""

Grid = tuple[int, int]
"""(rows, columns)."""


class Features(NamedTuple):
    """The patch features of one vision tower."""

    width: int
    grid: Grid

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]


class Connector(Section):
    """The options of one kind of connector, and what follows from them.

    A subclass is one file: its fields are keys of ``model.connector``, with their help below them; `kind` names it in
    recipes; `module` is the torch module. The module needs nothing but torch and its arguments, which are JSON-ready,
    so it also runs outside this project.
    """

    kind: ClassVar[str]
    """Value of ``model.connector.kind``."""
    module: ClassVar[type[nn.Module]]
    """Maps features [B, P, C] to image tokens [B, N, D]. Parameters of its own are set in ``reset_parameters``."""

    def tokens(self, grid: Grid) -> int:
        """Return the tokens of one image whose patches form ``grid``."""
        raise NotImplementedError

    def grid(self, grid: Grid) -> Grid | None:
        """Return the (rows, columns) of the image tokens; None, the default, when tokens have no place in the image."""
        return None

    def check(self, features: Features) -> None:
        """Check the options against the tower. Raises ConfigError naming the key and the fix."""

    def fix_for(self, tokens: int) -> str:
        """Return what to set for ``tokens`` tokens an image, as the advice of an error message."""
        return f"use model.connector.kind=perceiver with model.connector.latents={tokens}"

    def arguments(self, features: Features, out_width: int) -> dict[str, Any]:
        """Return the arguments of `module`, JSON-ready."""
        raise NotImplementedError

    def build(self, features: Features, out_width: int) -> nn.Module:
        """Build the module from features to tokens of ``out_width``. Raises ConfigError as `check` does."""
        self.check(features)
        return self.module(**self.arguments(features, out_width))

    def flops(self, features: Features, out_width: int) -> float:
        """Return the FLOPs of a forward pass of one image, counted on the meta device: every product counts 2."""
        with torch.device("meta"):
            module = self.build(features, out_width).requires_grad_(False)
            inputs = torch.empty(1, features.patches, features.width)
        with FlopCounterMode(display=False) as counter:
            module(inputs)
        return float(counter.get_total_flops())

    def to_dict(self) -> dict[str, Any]:
        """Return kind and options as JSON-ready values."""
        return {"kind": self.kind, **self.model_dump(mode="json")}
