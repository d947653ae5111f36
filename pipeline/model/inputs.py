"""The inputs of a pipeline stage for one micro-batch, apart from the previous stage's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pipeline.attention import AttentionPlan
from pipeline.model.patches import PatchLayout

IGNORE = -100


@dataclass(frozen=True)
class StageInputs:
    """One micro-batch: its packed rows joined into one sequence of T tokens.

    Every stage builds its own from the memory-mapped packs; only hidden states travel between stages.
    """

    input_ids: torch.Tensor
    """int64[T]; the image placeholder id at image positions."""
    position_ids: torch.Tensor
    """int64[T], counted from 0 in each segment."""
    plan: AttentionPlan
    """The attention plan of the micro-batch's sidecars."""
    labels: torch.Tensor
    """int64[T]: the token that position t predicts (already shifted), or IGNORE."""
    image_positions: torch.Tensor
    """int64[n_views * image_tokens]: positions of the image tokens, view by view; empty without images."""
    pixels: torch.Tensor | None = None
    """[n_views, 3, S, S]: uint8, which the stage normalises on its device, or float32, normalised; an image is one view
    or several (anyres). None on stages that do not hold the vision tower."""
    extra_pixels: tuple[torch.Tensor, ...] = ()
    """The same views for each further vision tower, [n_views, 3, S_k, S_k]."""
    layout: PatchLayout | None = None
    """Of images of their own sizes, whose pixels are patches [N, 3, S, S]; None on stages without the vision tower."""
    supervised: torch.Tensor | None = None
    """int64[n]: positions that have a label; precomputed, because finding them on a GPU would make the host wait."""
    per_token: bool = False
    """The last stage returns the loss of each supervised token, and whether it is the most likely one: evaluation."""

    def to(self, device: torch.device | str) -> StageInputs:
        """Return the inputs on another device."""
        moved = self.mapped(lambda tensor: tensor.to(device))
        layout = None if self.layout is None else self.layout.to(device)
        return replace(moved, plan=self.plan.to(device), layout=layout)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StageInputs:
        """Return the inputs with every tensor changed; the plan is kept."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed, extra_pixels=tuple(map(change, self.extra_pixels)))
