"""Parameter and FLOP counts of a model, computed on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from pipeline.config.schema import is_recomputed
from pipeline.model.spec import ModelSpec
from pipeline.model.trainable import Trainable
from pipeline.model.weights import parameter_shapes


class Cost(NamedTuple):
    """FLOPs of one part of the model."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Sizes:
    """Parameters of each part of the model."""

    vision: int
    connector: int
    embed: int
    layers: tuple[int, ...]
    """One count per decoder layer."""
    norm: int
    head: int
    """0 where the head shares the embedding's weight."""

    @classmethod
    def add_up(cls, sizes: Mapping[str, int], layers: int) -> Sizes:
        """Add up the sizes of parameters by global name, in a model of so many decoder layers."""

        def under(*prefix: str) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(prefix))

        by_layer = [0] * layers
        for name, size in sizes.items():
            if name.startswith("model.layers."):
                by_layer[int(name.split(".")[2])] += size
        return cls(
            vision=under("vision.", "extra_vision."), connector=under("connector."), embed=under("model.embed_tokens."),
            layers=tuple(by_layer), norm=under("model.norm."), head=under("lm_head."),
        )  # fmt: skip

    @property
    def total(self) -> int:
        """All parameters."""
        return self.vision + self.connector + self.embed + sum(self.layers) + self.norm + self.head

    def in_stage(self, layers: Sequence[int], *, first: bool, last: bool) -> int:
        """Return the parameters of a stage; a tied head counts again if the embedding is elsewhere."""
        size = sum(self.layers[layer] for layer in layers)
        if first:
            size += self.vision + self.connector + self.embed
        if last:
            size += self.norm + (self.head or (0 if first else self.embed))
        return size


@dataclass(frozen=True)
class ParamCounts(Sizes):
    """Parameters of each part, and how many of them are trained."""

    trained: Sizes
    connector_flops: float
    """FLOPs of the connector's forward pass of one image."""
    patches: float
    """Patch features of one image; the mean of several towers, weighted by their parameters."""

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        trains: Callable[[str], bool] | None = None,
        shapes: Iterable[tuple[str, tuple[int, ...]]] = (),
    ) -> ParamCounts:
        """Count a model's parameters without allocating them.

        Args:
            spec: the model.
            trains: whether the parameter of a global name is trained; default: everything but a frozen tower.
            shapes: of all parameters by global name; default: as the spec has them.
        """
        trains = trains or Trainable.everything_of(spec).trains
        sizes = {name: prod(shape) for name, shape in shapes or parameter_shapes(spec)}
        trained = {name: size for name, size in sizes.items() if trains(name)}
        towers = [sum(size for name, size in sizes.items() if name.startswith(f"{own}.")) for own in spec.towers]
        features = (spec.features, *spec.features.others)
        work = [size * own.patches for size, own in zip(towers, features, strict=True)]
        return cls(
            **vars(Sizes.add_up(sizes, spec.layers)),
            trained=Sizes.add_up(trained, spec.layers),
            connector_flops=spec.connector.flops(spec.features, spec.width),
            patches=sum(work) / sum(towers),
        )

    def of_stage(self, layers: Sequence[int], *, first: bool, last: bool) -> tuple[int, int]:
        """Return (trained, frozen) parameters of a stage; a tied head counts again if the embedding is elsewhere."""
        trained = self.trained.in_stage(layers, first=first, last=last)
        return trained, self.in_stage(layers, first=first, last=last) - trained

    def step_flops(self, *, tokens: int, targets: int, images: float) -> float:
        """Return the FLOPs of a step: 6 per parameter and token (2 forward, 4 backward), see :meth:`part_costs`.

        Attention scores of decoder and tower and recomputation are excluded, so an MFU based on this is a lower bound.
        The head counts supervised tokens only; the connector's FLOPs are counted from its own forward pass.
        """
        costs = self.part_costs(image_share=images / tokens, target_share=targets / tokens, recomputed=0)
        return tokens * sum(map(sum, costs))

    def part_costs(self, *, image_share: float, target_share: float, recomputed: int) -> Sequence[Cost]:
        """Return the FLOPs per packed token: before the decoder layers, of each layer, after them.

        Per parameter and token: 2 forward; 2 backward for its gradient if it is trained; 2 backward for the gradient of
        its module's input if anything at or before the module is trained.

        Args:
            image_share: images per packed token.
            target_share: supervised tokens per packed token.
            recomputed: k where every k-th decoder layer is recomputed in the backward pass; 0 = none.
        """
        flows = False  # whether a gradient passes through

        def cost(forward: float, share: float) -> Cost:
            """Return the cost of the next part, a ``share`` of whose weights is trained."""
            nonlocal flows
            flows |= share > 0
            return Cost(forward, forward * (share + flows))

        trained = self.trained
        vision = cost(2.0 * self.vision * self.patches * image_share, _ratio(trained.vision, self.vision))
        connector = cost(self.connector_flops * image_share, _ratio(trained.connector, self.connector))
        flows |= trained.embed > 0
        layers = [cost(2.0 * size, _ratio(own, size)) for size, own in zip(self.layers, trained.layers, strict=True)]
        for index, layer in enumerate(layers):
            if layer.backward and is_recomputed(index, recomputed):
                layers[index] = Cost(layer.forward, layer.backward + layer.forward)
        head = (self.head, trained.head) if self.head else (self.embed, trained.embed)
        after = cost(2.0 * head[0] * target_share, _ratio(head[1], head[0]))
        before = Cost(vision.forward + connector.forward, vision.backward + connector.backward)
        return [before, *layers, after]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
