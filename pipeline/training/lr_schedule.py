"""Learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from pipeline.config.schema import TrainSection


def learning_rate(config: TrainSection, step: int, steps: int) -> float:
    """Return the learning rate of ``step`` (0-based) of a run of ``steps``: linear warm-up to ``lr``, then a schedule.

    ``cosine`` (arXiv 1608.03983, without restarts) and ``linear`` fall to ``min_lr`` over the rest of the run;
    ``constant`` stays; ``wsd`` (warm-up, stable, decay; arXiv 2404.06395) stays, and falls linearly over the last
    ``decay_steps``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    first = config.warmup_steps
    if config.schedule == "wsd":
        first = max(first, steps - config.decay_steps)
    done = min(1.0, max(0, step - first) / max(1, steps - first))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left
