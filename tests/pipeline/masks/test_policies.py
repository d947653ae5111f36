"""Policies: every dense mask against plain Python, the clamp, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from data_prep.common.errors import UserError
from pipeline.masks import POLICIES, Sidecars, commit_index, dense_mask, get_policy, parse_layout
from pipeline.masks.policies import Policy, Unlock, _accept
from pipeline.masks.sidecars import run_starts, token_table
from pipeline.masks.spans import token_spans
from tests.pipeline.masks.rows import GRID, PlainRow, rows

SAFE = [name for name, policy in POLICIES.items() if not policy.leaks]
LEAKING = [name for name, policy in POLICIES.items() if policy.leaks]


@pytest.mark.parametrize("name", POLICIES)
@given(row=rows)
@settings(max_examples=15, deadline=None)
def test_the_dense_mask_is_the_definition(name: str, row: Sidecars) -> None:
    assert dense_mask(get_policy(name, allow_leak=True, grid=GRID), row).tolist() == PlainRow(row).mask(name)


@pytest.mark.parametrize("name", SAFE)
@given(row=rows)
@settings(max_examples=15, deadline=None)
def test_safe_policies_respect_the_commit_index(name: str, row: Sidecars) -> None:
    rows_i, columns_j = dense_mask(get_policy(name, grid=GRID), row).nonzero().unbind(1)
    assert torch.all(columns_j <= commit_index(row)[rows_i])
    assert torch.all(row.segment[rows_i] == row.segment[columns_j])


@pytest.mark.parametrize(
    ("name", "layout", "unlocked"),
    [
        pytest.param("mma", "V2 Q2 A1", {(0, 2), (0, 3), (1, 2), (1, 3)}, id="the-papers-rectangle"),
        pytest.param("mma", "V2 A2", set(), id="captions-are-causal-by-themselves"),
        pytest.param("mma", "V1 Q1 A1 Q1 A1", {(0, 1)}, id="an-earlier-image-does-not-read-later-questions"),
        pytest.param("mma", "Q1 V1 A1", set(), id="text-first-needs-nothing"),
        pytest.param("mma", "V1 Q1 A1 V1 Q1 A1", {(0, 1), (3, 4)}, id="each-turn-its-own-image"),
        pytest.param("mma_aki", "V1 Q1 A1 V1 Q1 A1", {(0, 1)}, id="aki-first-turn-only"),
        pytest.param("mma_general", "V1 V1 Q1", {(0, 2), (1, 2)}, id="two-images-are-alike"),
        pytest.param("mma_general_instance", "V1 V1 Q1", {(0, 1), (0, 2), (1, 2)}, id="two-images-differ"),
        pytest.param("mma_general", "Q1 V1 W1 A1", {(0, 1), (0, 2), (1, 2)}, id="text-sees-media-too"),
        pytest.param("mixed", "V2 Q1 U2 A1", {(0, 1), (3, 4)}, id="inside-one-medium"),
        pytest.param("mma_mixed", "V2 Q1 A1", {(0, 1), (0, 2), (1, 2)}, id="union"),
        pytest.param("prefix", "V1 Q2 A2", {(0, 1), (0, 2), (1, 2)}, id="prefix"),
        pytest.param(
            "future_v2v", "V1 V2 Q1 V1 Q1", {(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4)}, id="all-media-of-a-turn"
        ),
        pytest.param("future_v2v", "V1 Q1 A1 V1 Q1", set(), id="not-those-of-the-next"),
        pytest.param("future_full", "V1 Q1 V1 A1 Q1", {(0, 1), (0, 2)}, id="everything-given-of-the-turn"),
        pytest.param("mma", "V1 Q1 | V1 Q1", {(0, 1), (2, 3)}, id="segments-stay-apart"),
    ],
)
def test_which_pairs_each_policy_unlocks(name: str, layout: str, unlocked: set[tuple[int, int]]) -> None:
    row = parse_layout(layout)
    beyond = dense_mask(name, row) & ~dense_mask("causal", row)
    assert {(i, j) for i, j in beyond.nonzero().tolist()} == unlocked


@pytest.mark.parametrize("name", LEAKING)
def test_ablations_need_allow_leak(name: str) -> None:
    with pytest.raises(UserError, match="allow_leak"):
        get_policy(name)
    assert get_policy(name, allow_leak=True).leaks


def test_an_unknown_policy_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"unknown mask policy 'mma_mixd'.*did you mean 'mma_mixed'"):
        get_policy("mma_mixd")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("mmada", r"'mmada' attends both ways between all tokens, answers too.*use 'prefix'", id="mmada"),
        pytest.param("llada_v", "denoising", id="llada"),
        pytest.param("within_image", "'within_image' of Molmo2 is the rule of 'mixed'", id="molmo2"),
        pytest.param("future_v2t", "the rule of 'mma'", id="future-v2t"),
    ],
)
def test_masks_of_other_projects_are_named(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_policy(name)


def test_a_policy_may_change_with_the_layer() -> None:
    policy = get_policy("mma+0:2=mixed+4:5=causal+6:7=mixed")
    assert [policy.at(layer).name for layer in range(8)] == [
        "mixed", "mixed", "mma", "mma", "causal", "mma", "mixed", "mma",
    ]  # fmt: skip
    assert [part.name for part in policy.parts] == ["mma", "mixed", "causal"]
    assert not policy.may_leak and policy.summary == (
        "mma; mixed in layers 0 to 1, causal in layers 4 to 4, mixed in layers 6 to 6"
    )
    row = parse_layout("V2 Q1 A1")
    with pytest.raises(UserError, match="a mask per layer"):
        dense_mask(policy, row)
    assert torch.equal(dense_mask(policy.at(0), row), dense_mask("mixed", row))
    assert get_policy("causal+0:1=image_tokens", allow_leak=True).may_leak


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("mma+0:8", "write first:end=policy", id="no-policy"),
        pytest.param("mma+8:8=mixed", "write first:end=policy", id="empty"),
        pytest.param("mma+0:4=mixed+3:5=causal", "layer 3 has two policies", id="overlap"),
        pytest.param("mma+0:4=mixde", "did you mean 'mixed'", id="unknown"),
        pytest.param("mma+0:4=image_tokens", "allow_leak", id="leaks"),
        pytest.param("mma+0:4=cca", "sets the positions of image tokens", id="grid"),
        pytest.param("cca+0:4=mma", "sets the positions of image tokens", id="grid-base"),
    ],
)
def test_ranges_of_layers_are_checked(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_policy(name, grid=GRID)


def test_cca_needs_a_matching_grid() -> None:
    with pytest.raises(UserError, match="connector does not keep"):
        get_policy("cca")
    with pytest.raises(UserError, match="image 0 at token 1 has 5 tokens, but its grid is 3 x 4"):
        dense_mask(get_policy("cca", grid=GRID), parse_layout("Q1 V5 Q2"))


@pytest.mark.parametrize("column", ["commit", "segment_end", "position"])
def test_a_predicate_reads_only_what_is_constant_over_a_token_span(column: str) -> None:
    """Spans are evaluated once: a column that changes inside one would give a wrong mask and a wrong proof."""
    with pytest.raises(UserError, match=rf"'early' reads '{column}': a predicate may read only segment, modality"):
        Policy("early", "reads what it must not", lambda i, j: getattr(i, column) <= getattr(j, column))


@pytest.mark.parametrize(
    ("unlock", "words"),
    [
        pytest.param(lambda i, j: np.arange(len(i.turn)) < 3, "may depend only on the values", id="its-place"),
        pytest.param(lambda i, j: i.turn > i.turn.mean(), "may depend only on the values", id="the-other-pairs"),
        pytest.param(lambda i, j: i.turn, "one boolean per pair", id="numbers"),
        pytest.param(lambda i, j: True, "one boolean per pair", id="one-answer"),
    ],
)
def test_a_predicate_is_a_function_of_two_tokens(unlock: Unlock, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Policy("odd", "no function of a pair", unlock)


@given(row=rows)
@settings(max_examples=50, deadline=None)
def test_a_new_span_begins_where_any_predicate_column_changes(row: Sidecars) -> None:
    table = token_table(row)
    starts = run_starts(table.segment) | (table.segment == 0)
    spans = token_spans(POLICIES["mma"], table, starts)
    inside = np.ones(len(table), dtype=bool)
    inside[spans.start] = False
    for column in table.span_columns:
        assert not np.any((column[1:] != column[:-1]) & inside[1:])


class Unclamped(Policy):
    """A policy whose table shows answers."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: Unclamped("foreign", ""), "it is a Unclamped, not a Policy", id="subclass"),
        pytest.param(lambda: lambda i, j: i, "it is a function, not a Policy", id="predicate"),
        pytest.param(lambda: Policy("other", ""), "its name is 'other'", id="name"),
        pytest.param(lambda: Policy("foreign", "", lambda i, j: i.labels), "reads 'labels'", id="column"),
        pytest.param(lambda: changed(lambda i, j: i.labels), "reads 'labels'", id="changed-later"),
    ],
)
def test_a_policy_of_another_package_keeps_the_contract(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _accept("foreign", make())


def changed(unlock: Unlock) -> Policy:
    """Return a policy whose predicate was exchanged after its check."""
    policy = Policy("foreign", "")
    object.__setattr__(policy, "unlock", unlock)
    return policy
