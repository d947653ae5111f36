"""What the libraries underneath are told before they are loaded."""

from __future__ import annotations

import os
import warnings

import torch


def settle_libraries() -> None:
    """Name DeepSpeed's device, which it would guess aloud, and pass over calls of its that torch will rename.

    CUDA loads its kernels at the start, as NCCL's authors advise: one that is loaded at its first use waits until all
    that runs has ended, and that may be a collective waiting for another rank. It costs some device memory.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read when CUDA is first asked for anything, as below
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
