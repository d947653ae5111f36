"""Parameter and FLOP counts of a model, computed on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from pipeline.model.spec import ModelSpec


class Cost(NamedTuple):
    """FLOPs of one part of the model."""

    forward: float
    backward: float


@dataclass(frozen=True)
class ParamCounts:
    """Parameter counts by part of the model."""

    vision: int
    connector: int
    connector_flops: float
    """FLOPs of the connector's forward pass of one image."""
    embed: int
    layers: tuple[int, ...]
    """One count per decoder layer."""
    norm: int
    head: int
    """0 where the head shares the embedding's weight."""
    patches: int
    """Patch features of one image."""
    vision_frozen: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> ParamCounts:
        """Count a model's parameters without allocating them."""
        parts = spec.llm_family.parts(spec.meta_llm())
        return cls(
            vision=_size(spec.meta_vision()),
            connector=_size(spec.meta_connector()),
            connector_flops=spec.connector.flops(spec.features, spec.width),
            embed=_size(parts.embed_tokens),
            layers=tuple(_size(layer) for layer in parts.layers),
            norm=_size(parts.norm),
            head=0 if spec.tied else _size(parts.lm_head),
            patches=spec.patches,
            vision_frozen=spec.vision_frozen,
        )

    @property
    def total(self) -> int:
        """All parameters."""
        return self.vision + self.connector + self.embed + sum(self.layers) + self.norm + self.head

    def of_stage(self, layers: Sequence[int], *, first: bool, last: bool) -> tuple[int, int]:
        """Return (trained, frozen) parameters of a stage; a tied head counts again if the embedding is elsewhere."""
        trained = sum(self.layers[layer] for layer in layers)
        if first:
            trained += self.connector + self.embed + (0 if self.vision_frozen else self.vision)
        if last:
            trained += self.norm + (self.head or (0 if first else self.embed))
        return trained, self.vision if first and self.vision_frozen else 0

    def step_flops(self, *, tokens: int, targets: int, images: int) -> float:
        """Return the FLOPs of a step: 6 per parameter and token (2 forward, 4 backward), 2 for frozen parameters.

        Attention scores of decoder and tower and recomputation are excluded, so an MFU based on this is a lower bound.
        The head counts supervised tokens only; the connector's FLOPs are counted from its own forward pass.
        """
        decoder = 6.0 * sum(self.layers) * tokens + 6.0 * (self.head or self.embed) * targets
        vision = (2.0 if self.vision_frozen else 6.0) * self.vision * self.patches * images
        return decoder + vision + 3.0 * self.connector_flops * images

    def part_costs(self, *, image_share: float, target_share: float, recomputed: bool) -> Sequence[Cost]:
        """Return the FLOPs per packed token: before the decoder layers, of each layer, after them.

        Args:
            image_share: images per packed token.
            target_share: supervised tokens per packed token.
            recomputed: decoder layers are recomputed in the backward pass.
        """
        vision = self.vision * self.patches * image_share
        before = vision + self.connector_flops / 2.0 * image_share
        trained = before - (vision if self.vision_frozen else 0.0)
        layers = [Cost(2.0 * count, (6.0 if recomputed else 4.0) * count) for count in self.layers]
        after = (self.head or self.embed) * target_share
        return [Cost(2.0 * before, 4.0 * trained), *layers, Cost(2.0 * after, 4.0 * after)]


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
