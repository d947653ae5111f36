"""A callback that turns MMA on in any trainer that takes transformers' callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from pipeline.hf.enable import enable_mma


class MMACallback(TrainerCallback):  # type: ignore[misc]
    """Calls :func:`enable_mma` on the model when training begins."""

    def __init__(self, policy: str = "mma", **options: Any) -> None:
        """Take the arguments of :func:`enable_mma`."""
        self.policy, self.options = policy, options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enable MMA on the trainer's model. Raises UserError as :func:`enable_mma` does."""
        enable_mma(kwargs["model"], self.policy, **self.options)
