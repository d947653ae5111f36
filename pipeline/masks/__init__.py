"""Attention masks as pure functions of per-token sidecars: commit index, policies, dense oracle and proof."""

from data_prep.common.modalities import MODALITIES
from pipeline.masks.layout import parse_layout
from pipeline.masks.policies import POLICIES, Policy, dense_mask, get_policy
from pipeline.masks.proof import Proof, check_rows, prove
from pipeline.masks.sidecars import Sidecars, commit_index, position_ids

__all__ = [
    "MODALITIES",
    "POLICIES",
    "Policy",
    "Proof",
    "Sidecars",
    "check_rows",
    "commit_index",
    "dense_mask",
    "get_policy",
    "parse_layout",
    "position_ids",
    "prove",
]
