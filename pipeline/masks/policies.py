"""Attention policies: one-line predicates over sidecars, made safe by the commit index.

Token i sees token j of the same segment if ``j <= i``, or if the policy's predicate unlocks the pair and j is within
the clamp, ``j <= c(i)`` (c: the commit index). The two ablations have no clamp and leak answers; they exist to
demonstrate the leak and must be enabled explicitly. The base rule is Modality-Mutual Attention (arXiv 2503.02597).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.modalities import IMAGE, TEXT
from pipeline.masks.sidecars import BoolArray, Sidecars, SpanColumns, TokenTable, token_table

_PROBES = 64

Unlock: TypeAlias = Callable[[SpanColumns, SpanColumns], BoolArray]
"""``unlock(i, j)``: whether token i may see the later token j.

Called on columns of equal or broadcastable shapes; the result may depend only on the values of the two tokens.
"""


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule for which tokens of a packed row see which.

    Raises UserError when ``unlock`` reads a column that can change within a token span, or depends on anything but
    the values of the two tokens.
    """

    name: str
    summary: str
    """One line for ``--help`` and pictures."""
    unlock: Unlock | None = None
    """None: nothing beyond causal."""
    leaks: bool = False
    """No clamp: tokens may see generated tokens that follow them (ablations only)."""
    needs_grid: bool = False
    """Image tokens must lie on a 2-D grid (not come from a resampler)."""
    grid: tuple[int, int] | None = None
    """Patches per image as (rows, columns), for policies that need it."""

    def __post_init__(self) -> None:
        if self.unlock is not None:
            _check_predicate(self.name, self.unlock)

    def table(self, sidecars: Sidecars) -> TokenTable:
        """Return the row's columns, with rings if the policy has a grid.

        Raises UserError when an image does not fit the grid.
        """
        return token_table(sidecars, self.grid)


def _check_predicate(name: str, unlock: Unlock) -> None:
    """Evaluate a predicate on random pairs of tokens: together, reversed and one by one. Raises UserError."""
    values = np.random.default_rng(0).integers(0, 3, (2, len(SpanColumns._fields), _PROBES))
    i, j = (SpanColumns(*columns) for columns in values)
    backwards = np.arange(_PROBES)[::-1]
    try:
        together, reverse = unlock(i, j), unlock(i.at(backwards), j.at(backwards))
        alone = [unlock(i.at([pair]), j.at([pair])) for pair in range(_PROBES)]
    except AttributeError as error:
        raise UserError(
            f"mask policy '{name}' reads '{error.name}': a predicate may read only {', '.join(SpanColumns._fields)}, "
            "which are constant within a token span"
        ) from error
    if not isinstance(together, np.ndarray) or together.dtype != np.bool_ or together.shape != (_PROBES,):
        raise UserError(f"mask policy '{name}': the predicate must return one boolean per pair of tokens")
    if not np.array_equal(together, reverse[backwards]) or not np.array_equal(together, np.concatenate(alone)):
        raise UserError(f"mask policy '{name}': the predicate may depend only on the values of the two tokens")


_POLICIES = (
    Policy("causal", "baseline: every token sees the tokens before it"),
    Policy(
        "mma",
        "media also see the given text that follows in their turn (the paper's rule)",
        lambda i, j: (i.modality != TEXT) & (j.modality == TEXT),
    ),
    Policy(
        "mma_general",
        "given tokens of different modality see each other within a turn",
        lambda i, j: i.modality != j.modality,
    ),
    Policy(
        "mma_general_instance",
        "like mma_general, but two images also count as different",
        lambda i, j: i.instance != j.instance,
    ),
    Policy(
        "mma_aki",
        "like the released AKI weights: images of the first turn see its text up to the assistant header",
        lambda i, j: (i.modality == IMAGE) & (j.modality == TEXT) & (i.turn == 0),
    ),
    Policy(
        "mixed",
        "bidirectional within each medium, causal elsewhere",
        lambda i, j: (i.instance == j.instance) & (i.instance >= 0),
    ),
    Policy(
        "mma_mixed",
        "mma and mixed combined",
        lambda i, j: ((i.modality != TEXT) & (j.modality == TEXT)) | ((i.instance == j.instance) & (i.instance >= 0)),
    ),
    Policy(
        "prefix",
        "bidirectional among all given tokens of a turn (prefix LM)",
        lambda i, j: (i.generated == 0) & (j.generated == 0),
    ),
    Policy(
        "cca",
        "concentric: within an image, outer rings come before inner rings (arXiv 2410.15926)",
        lambda i, j: (i.modality == IMAGE) & (i.instance == j.instance) & (i.ring == j.ring),
        needs_grid=True,
    ),
    Policy(
        "mma_unclamped",
        "ablation, leaks: different modalities see each other, even answers (the paper's interleaved form, verbatim)",
        lambda i, j: i.modality != j.modality,
        leaks=True,
    ),
    Policy(
        "image_to_answer",
        "ablation, leaks: media see all later text of the segment, even answers",
        lambda i, j: (i.modality != TEXT) & (j.modality == TEXT),
        leaks=True,
    ),
)
POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in _POLICIES}


def get_policy(name: str, *, allow_leak: bool = False, grid: tuple[int, int] | None = None) -> Policy:
    """Return a policy by name.

    Args:
        name: a key of ``POLICIES``.
        allow_leak: accept the ablations whose images see the answers.
        grid: image tokens as (rows, columns); None when the connector keeps no grid.

    Raises:
        UserError: the name is unknown, the policy leaks and ``allow_leak`` is not set, or it needs a grid.
    """
    if name not in POLICIES:
        raise UserError(f"unknown mask policy '{name}'{did_you_mean(name, POLICIES)}; known: {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if policy.leaks and not allow_leak:
        raise UserError(
            f"mask policy '{name}' is an ablation that shows the model the answers it is trained on: "
            "set allow_leak to true to run it on purpose, or use 'mma'"
        )
    if policy.needs_grid and grid is None:
        raise UserError(
            f"mask policy '{name}' orders image tokens by their place in the image, which this connector does not "
            "keep: choose a model.connector.kind that keeps it, such as mlp or cabstractor (in mma mask and mma prove: "
            "give --grid), or use policy 'mma'"
        )
    return replace(policy, grid=grid) if policy.needs_grid else policy


def dense_mask(policy: Policy | str, sidecars: Sidecars) -> torch.Tensor:
    """Return bool[T, T], True where token i (row) sees token j (column); O(T^2) memory.

    This is the oracle for every fast backend. Padding tokens see only themselves, so no softmax is empty.

    Raises UserError for an unknown policy, or an image that does not fit the policy's grid.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    table = policy.table(sidecars)
    index = np.arange(len(table))
    i, j = table[:, None], table[None, :]
    past = index[None, :] <= index[:, None]
    if policy.grid is not None:  # inside an image the order is by ring, not by index
        inside = (i.modality == IMAGE) & (i.instance == j.instance)
        past = np.where(inside, j.ring <= i.ring, past)
    allowed = past
    if policy.unlock is not None:
        clamp = i.segment_end if policy.leaks else i.commit
        allowed = past | (policy.unlock(i.span_columns, j.span_columns) & (index[None, :] <= clamp))
    same = (i.segment == j.segment) & (i.segment > 0)
    return torch.from_numpy((same & allowed) | np.eye(len(table), dtype=np.bool_)).to(sidecars.segment.device)
