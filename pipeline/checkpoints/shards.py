"""What a rank saves of its stage: flat shards of weights and optimizer states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline.parallel.zero3 import STATES, Zero3Stage


def everything(name: str) -> bool:
    """Save every frozen parameter, so that a checkpoint is complete by itself."""
    return True


def shards(stage: Zero3Stage, stores: Callable[[str], bool] = everything) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key in the file, tensor) of what a rank saves: the live tensors, on their device, padding set to 0.

    ``stores``: whether a frozen parameter is saved; others are in the base weights.
    """
    for name, param in stage.trainable():
        yield f"master|{name}", _without_padding(stage, param, stage.master_shard(param))
        for state in STATES:
            yield f"{state}|{name}", _without_padding(stage, param, stage.master_shard(param, state))
    for name, param in stage.frozen():
        if not stores(name):
            continue
        yield f"frozen|{name}", _without_padding(stage, param, stage.compute_shard(param))


def _without_padding(stage: Zero3Stage, param: torch.nn.Parameter, shard: torch.Tensor) -> torch.Tensor:
    """Clear what lies past the end of a parameter whose size the data-parallel ranks do not divide.

    DeepSpeed leaves that memory uninitialized. Nothing reads it, but it would make files of equal runs differ, and it
    may hold values that are not finite.
    """
    own = stage.full_shape(param).numel() - stage.topology.dp_rank * shard.numel()
    if own < shard.numel():
        shard[max(own, 0) :].zero_()
    return shard


def first_not_finite(shards: Mapping[str, torch.Tensor]) -> str | None:
    """Return the key of a shard that holds a value that is not finite, or above about 1e19; None if there is none.

    One read of each shard: its fp32 norm is finite unless a value or its square is not.
    """
    if not shards:
        return None
    norms = torch.stack(torch._foreach_norm(list(shards.values()), 2, torch.float32)).cpu()
    return next((key for key, norm in zip(shards, norms.tolist(), strict=True) if not math.isfinite(norm)), None)
