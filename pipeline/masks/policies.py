"""Attention policies: one-line predicates over sidecars, made safe by the commit index.

Token i sees token j of the same segment if ``j <= i``, or if the policy's predicate unlocks the pair and j is within
the clamp, ``j <= c(i)`` (c: the commit index). The ablations have no clamp and leak answers; they exist to
demonstrate the leak and must be enabled explicitly. The base rule is Modality-Mutual Attention (arXiv 2503.02597).

A policy may hold in some decoder layers only: ``mma+0:8=mixed`` is ``mixed`` in layers 0 to 7 and ``mma`` in the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.modalities import IMAGE, TEXT
from data_prep.common.plugins import Registry, same_name
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
    layers: tuple[tuple[range, Policy], ...] = ()
    """Decoder layers, counted from 0, in which another policy holds; the ranges do not overlap."""

    def __post_init__(self) -> None:
        if self.unlock is not None:
            _check_predicate(self.name, self.unlock)

    def at(self, layer: int) -> Policy:
        """Return the policy of one decoder layer, itself the same in all layers."""
        return next((policy for layers, policy in self.layers if layer in layers), self.base)

    @property
    def base(self) -> Policy:
        """The policy of the layers that no range names."""
        return replace(self, name=self.name.partition("+")[0], layers=()) if self.layers else self

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The different policies of the layers, each the same in all layers; the base first."""
        return tuple({policy.name: policy for policy in (self.base, *(policy for _, policy in self.layers))}.values())

    @property
    def may_leak(self) -> bool:
        """Whether a layer has no clamp."""
        return any(policy.leaks for policy in self.parts)

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
        "future_v2v",
        "media of a turn see each other both ways, across images (arXiv 2505.18605, clamped)",
        lambda i, j: (i.modality != TEXT) & (j.modality != TEXT),
    ),
    Policy(
        "future_full",
        "media see everything given that follows in their turn (arXiv 2505.18605, clamped)",
        lambda i, j: (i.modality != TEXT) & (j.generated == 0),
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
    Policy(
        "image_tokens",
        "ablation, leaks over turns: all media of the segment see each other both ways, as in Molmo2",
        lambda i, j: (i.modality != TEXT) & (j.modality != TEXT),
        leaks=True,
    ),
)


def _accept(name: str, found: object) -> Policy:
    """Return the policy of a plug-in, checked as the project's own are. Raises UserError."""
    if type(found) is not Policy:  # a subclass could go around the clamp
        raise UserError(f"it is a {type(found).__name__}, not a Policy")
    return same_name(name, replace(found), "name")


POLICIES: Registry[Policy] = Registry(
    "mma.policies", "mask policy", {policy.name: policy for policy in _POLICIES}, _accept
)
"""Policies by name."""
_DENOISING = (
    "attends both ways between all tokens, answers too. Its models are trained by denoising masked tokens, not by "
    "predicting the next one, which would leak every answer here: use 'prefix', which does so for given tokens"
)
_ELSEWHERE = {
    "bidirectional": _DENOISING,
    "full": _DENOISING,
    "llada_v": _DENOISING,
    "mmada": _DENOISING,
    "future_v2t": "is the rule of 'mma' once it stops at the commit index; 'image_to_answer' does not stop there",
    "within_image": "of Molmo2 is the rule of 'mixed'",
}
"""Masks of other projects that have no entry of their own, and why."""
_RANGE = re.compile(r"(\d{1,4}):(\d{1,4})=([^+]+)", re.ASCII)


def get_policy(name: str, *, allow_leak: bool = False, grid: tuple[int, int] | None = None) -> Policy:
    """Return a policy by name.

    Args:
        name: a key of ``POLICIES``, or one that changes with the layer, such as ``mma+0:8=mixed+24:32=causal``.
        allow_leak: accept the ablations whose images see the answers.
        grid: image tokens as (rows, columns); None when the connector keeps no grid.

    Raises:
        UserError: the name is unknown, the policy leaks and ``allow_leak`` is not set, it needs a grid, or its ranges
            of layers cannot be read, overlap or mix a policy that needs a grid with others.
    """
    base, *ranges = name.split("+")
    policy = _one_policy(base, allow_leak, grid)
    if not ranges:
        return policy
    layers = tuple((_layers_of(text), _one_policy(text.partition("=")[2], allow_leak, grid)) for text in ranges)
    _check_layers(name, policy, layers)
    summary = f"{policy.name}; " + ", ".join(f"{part.name} in layers {x.start} to {x.stop - 1}" for x, part in layers)
    return replace(policy, name=name, summary=summary, layers=layers)


def _one_policy(name: str, allow_leak: bool, grid: tuple[int, int] | None) -> Policy:
    """Return a policy that is the same in all layers. Raises UserError as :func:`get_policy` does."""
    if name in _ELSEWHERE:
        raise UserError(f"mask policy '{name}' {_ELSEWHERE[name]}")
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
            "keep, nor images of different sizes (media): choose a model.connector.kind that keeps it, such as mlp or "
            "cabstractor (in mma mask and mma prove: give --grid), or use policy 'mma'"
        )
    return replace(policy, grid=grid) if policy.needs_grid else policy


def _layers_of(text: str) -> range:
    """Read the layers of ``0:8=mixed``. Raises UserError for anything else."""
    match = _RANGE.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"mask layers '{text}': write first:end=policy, such as 0:8=mixed for layers 0 to 7; layers count from 0"
        )
    return range(int(match[1]), int(match[2]))


def _check_layers(name: str, policy: Policy, layers: tuple[tuple[range, Policy], ...]) -> None:
    """Refuse ranges that overlap, and policies that need their own positions or order. Raises UserError."""
    ordered = sorted((one for one, _ in layers), key=lambda one: one.start)
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise UserError(f"mask policy '{name}': layer {after.start} has two policies: let the ranges not overlap")
    for part in (policy, *(part for _, part in layers)):
        if part.needs_grid:
            raise UserError(
                f"mask policy '{name}': '{part.name}' also sets the positions of image tokens, which all layers share: "
                "use it in all layers, or another policy"
            )


def dense_mask(policy: Policy | str, sidecars: Sidecars) -> torch.Tensor:
    """Return bool[T, T], True where token i (row) sees token j (column); O(T^2) memory.

    This is the oracle for every fast backend. Padding tokens see only themselves, so no softmax is empty.

    Raises UserError for an unknown policy, one that changes with the layer, or an image that does not fit its grid.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    if policy.layers:
        raise UserError(f"mask policy '{policy.name}' has a mask per layer: ask for one layer's with policy.at(layer)")
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
