"""Attention under a plan: the mask of each packed segment is derived from sidecars and never materialised."""

from pipeline.attention.backends import BACKENDS, attend, slow_path_reason
from pipeline.attention.plan import AttentionPlan, build_plan, build_separate_plan

__all__ = [
    "BACKENDS",
    "AttentionPlan",
    "attend",
    "build_plan",
    "build_separate_plan",
    "register",
    "slow_path_reason",
]


def register() -> str:
    """Register ``attn_implementation="mma"`` with transformers (imported only here); return the name."""
    from pipeline.attention import hf

    return hf.register()
