"""Attention under a plan: the mask of each packed segment, rebuilt from sidecars and never materialised."""

from pipeline.attention.backends import BACKENDS, attend
from pipeline.attention.plan import AttentionPlan, build_plan

__all__ = ["BACKENDS", "AttentionPlan", "attend", "build_plan", "register"]


def register() -> str:
    """Make ``attn_implementation="mma"`` known to transformers (imported only here); returns the name."""
    from pipeline.attention import hf

    return hf.register()
