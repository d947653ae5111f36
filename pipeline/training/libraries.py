"""What the libraries underneath are told before they are loaded."""

from __future__ import annotations

import os
import warnings

import torch


def settle_libraries() -> None:
    """Name DeepSpeed's device, which it would guess aloud, and pass over calls of its that torch will rename."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
