"""Learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from pipeline.config.schema import TrainSection


def learning_rate(config: TrainSection, step: int, steps: int) -> float:
    """Return the learning rate of ``step`` (0-based): linear warm-up to ``lr``, then a cosine down to ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
