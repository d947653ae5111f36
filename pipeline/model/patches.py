"""Images of their own sizes, packed patch by patch into one sequence.

N patches of all images, row by row and image by image; M tokens; m patches per side become one token (``merge``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.attention import AttentionPlan, build_separate_plan

Grid = tuple[int, int]
"""(rows, columns) of patches."""


@dataclass(frozen=True)
class PatchLayout:
    """Where the patches of each image lie in the packed sequence, and how they attend."""

    grids: tuple[Grid, ...]
    """Of the images, multiples of m."""
    order: torch.Tensor
    """int64[N]: patches block by block, the m x m patches of a token side by side."""
    merge: int
    plan: AttentionPlan
    """Every patch sees the patches of its own image."""

    @classmethod
    def of(cls, grids: Sequence[Grid], merge: int) -> PatchLayout:
        """Lay out images with these grids, at least one, on the CPU."""
        blocks, start = [], 0
        for rows, columns in grids:
            numbers = torch.arange(start, start + rows * columns)
            tokens = numbers.view(rows // merge, merge, columns // merge, merge)
            blocks.append(tokens.transpose(1, 2).flatten())
            start += rows * columns
        lengths = [rows * columns for rows, columns in grids]
        return cls(tuple(grids), torch.cat(blocks), merge, build_separate_plan(lengths))

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        return [rows * columns for rows, columns in self.grids]

    def blocks(self, features_NC: torch.Tensor) -> torch.Tensor:
        """Return the features of the patches of each token, [M, m x m, C], row by row."""
        return torch.unflatten(features_NC.index_select(0, self.order), 0, (-1, self.merge**2))

    def to(self, device: torch.device | str) -> PatchLayout:
        """Return the layout on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True), self.plan.to(device))

    def pin_memory(self) -> PatchLayout:
        """Return the layout in page-locked memory."""
        return self._mapped(torch.Tensor.pin_memory, self.plan.pin_memory())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor], plan: AttentionPlan) -> PatchLayout:
        return replace(self, order=change(self.order), plan=plan)
