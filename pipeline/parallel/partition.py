"""Which decoder layers each pipeline stage holds, by cost or by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, permutations

from pipeline.config.schema import ConfigError

VirtualStages = tuple[range, ...]
"""Decoder layers of a stage, by virtual stage."""


def joined(virtual_stages: VirtualStages) -> list[int]:
    """Return all decoder layers of a stage."""
    return [layer for virtual_stage in virtual_stages for layer in virtual_stage]


def split_stages(
    layers: int, stages: int, virtual_stages: int, *, layers_per_stage: str = "", costs: Sequence[float] = ()
) -> tuple[VirtualStages, ...]:
    """Return the virtual stages of each stage: every ``stages``-th range of `split_layers`.

    A split by cost first minimises the cost of the most expensive stage, then evens out its virtual stages.

    Raises:
        ConfigError: The hand-made split does not fit, or there are more virtual stages than layers.
    """
    pieces = split_layers(layers, stages * virtual_stages, layers_per_stage=layers_per_stage, costs=costs)
    if not layers_per_stage:
        pieces = _ranges(_even_out([len(piece) for piece in pieces], list(costs) or _equal(layers), stages))
    return tuple(tuple(pieces[stage::stages]) for stage in range(stages))


def split_layers(layers: int, stages: int, *, layers_per_stage: str = "", costs: Sequence[float] = ()) -> list[range]:
    """Return the decoder layers of each stage.

    Every stage has at least one layer: ZeRO needs a trainable parameter on each stage.

    Args:
        layers: Decoder layers of the model.
        stages: Pipeline stages times virtual stages of each.
        layers_per_stage: ``"9,12,11"``: layers of each stage, or empty.
        costs: ``layers + 2`` relative costs: what precedes the layers (vision, connector, embedding), each layer, what
            follows them (head and loss). Empty = 1 for every layer, 0 for the rest.

    Raises:
        ConfigError: The hand-made split does not fit, or there are more stages than layers.
    """
    if stages > layers:
        raise ConfigError(
            f"parallel.pp x parallel.virtual_stages = {stages} is more than the model's {layers} decoder layers: "
            f"use at most {layers} in all"
        )
    return _ranges(
        _parse(layers_per_stage, layers, stages)
        if layers_per_stage
        else _balance(list(costs) or _equal(layers), stages)
    )


def _equal(layers: int) -> list[float]:
    return [0.0, *[1.0] * layers, 0.0]


def _ranges(counts: Sequence[int]) -> list[range]:
    return [range(lo, hi) for lo, hi in pairwise(accumulate(counts, initial=0))]


def _parse(text: str, layers: int, stages: int) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"parallel.layers_per_stage='{text}' is not a list of layer counts such as '9,12,11'"
        ) from None
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise ConfigError(
            f"parallel.layers_per_stage='{text}' must list {stages} counts of at least 1 (parallel.pp x "
            f"parallel.virtual_stages) that add up to {layers} decoder layers"
        )
    return counts


def _balance(costs: Sequence[float], stages: int) -> list[int]:
    """Minimise the most expensive stage (dynamic programming over contiguous splits; every stage has a layer)."""
    layers = len(costs) - 2
    total = [0.0]
    for cost in costs[1:-1]:
        total.append(total[-1] + cost)
    best = [[float("inf")] * (layers + 1) for _ in range(stages + 1)]
    cut = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        ends = (costs[0] if stage == 1 else 0.0) + (costs[-1] if stage == stages else 0.0)
        for hi in range(stage, layers + 1):
            for lo in range(stage - 1, hi):
                cost = max(best[stage - 1][lo], total[hi] - total[lo] + ends)
                if cost < best[stage][hi]:
                    best[stage][hi], cut[stage][hi] = cost, lo
    edges = [layers]
    for stage in range(stages, 0, -1):
        edges.append(cut[stage][edges[-1]])
    edges.reverse()
    return [hi - lo for lo, hi in pairwise(edges)]


def _even_out(counts: Sequence[int], costs: Sequence[float], stages: int) -> list[int]:
    """Move single layers between virtual stages while this lowers the highest stage cost, or evens them out."""
    total = [0.0, *accumulate(costs[1:-1])]

    def key(tried: Sequence[int]) -> tuple[float, float]:
        pieces = [total[hi] - total[lo] for lo, hi in pairwise(accumulate(tried, initial=0))]
        pieces[0] += costs[0]
        pieces[-1] += costs[-1]
        highest = max(sum(pieces[stage::stages]) for stage in range(stages))
        return round(highest / sum(costs), 9), sum(piece * piece for piece in pieces) / sum(costs) ** 2

    best = list(counts)
    while True:
        moves = [
            [count + (place == target) - (place == source) for place, count in enumerate(best)]
            for source, target in permutations(range(len(best)), 2)
            if best[source] > 1
        ]
        found = min(moves, key=key, default=best)
        if key(found) >= key(best):
            return best
        best = found
