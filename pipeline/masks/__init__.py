"""Attention masks as pure functions of per-token sidecars: commit index, policies and their dense oracle."""

from pipeline.masks.policies import POLICIES, Policy, dense_mask, get_policy
from pipeline.masks.sidecars import MODALITIES, Sidecars, commit_index, position_ids

__all__ = ["MODALITIES", "POLICIES", "Policy", "Sidecars", "commit_index", "dense_mask", "get_policy", "position_ids"]
