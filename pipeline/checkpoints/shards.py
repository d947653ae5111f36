"""What a rank saves of its stage: flat shards of weights and optimizer states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from pipeline.parallel.zero3 import STATES, Zero3Stage


def shards(stage: Zero3Stage) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key in the file, tensor) of what a rank saves: the live tensors, on their device."""
    for name, param in stage.trainable():
        yield f"master|{name}", stage.master_shard(param)
        yield from ((f"{state}|{name}", stage.master_shard(param, state)) for state in STATES)
    yield from ((f"frozen|{name}", stage.compute_shard(param)) for name, param in stage.frozen())


def first_not_finite(shards: Mapping[str, torch.Tensor]) -> str | None:
    """Return the key of a shard that holds a value that is not finite, or above about 1e19; None if there is none.

    One read of each shard: its fp32 norm is finite unless a value or its square is not.
    """
    if not shards:
        return None
    norms = torch.stack(torch._foreach_norm(list(shards.values()), 2, torch.float32)).cpu()
    return next((key for key, norm in zip(shards, norms.tolist(), strict=True) if not math.isfinite(norm)), None)
