"""Proofs against a brute-force closure of the dense mask."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.masks import (
    POLICIES,
    Policy,
    Sidecars,
    check_rows,
    commit_index,
    dense_mask,
    get_policy,
    parse_layout,
    prove,
)
from tests.pipeline.masks.rows import GRID, rows


def closure(policy: Policy, row: Sidecars, layers: int) -> tuple[int | None, int | None]:
    """First layers of a leak and of a read beyond the commit index, by multiplication of the layers' dense masks."""
    index = torch.arange(len(row))
    follows = (row.segment[1:] == row.segment[:-1]) & (row.segment[1:] > 0) & (row.generated[1:] == 1)
    predicts = torch.cat([follows, torch.tensor([False])])
    answers = (row.generated == 1) & (row.segment > 0)
    leaks = predicts[:, None] & answers[None, :] & (index[None, :] > index[:, None])
    beyond = index[None, :] > commit_index(row)[:, None]
    reach, firsts = torch.eye(len(row)), [None, None]
    for layer in range(1, layers + 1):
        reach = ((dense_mask(policy.at(layer - 1), row).float() @ reach) > 0).float()
        for n, forbidden in enumerate((leaks, beyond)):
            if firsts[n] is None and bool((reach.bool() & forbidden).any()):
                firsts[n] = layer
    return firsts[0], firsts[1]


@pytest.mark.parametrize("name", POLICIES)
@given(row=rows, layers=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_proof_is_the_closure_of_the_mask(name: str, row: Sidecars, layers: int) -> None:
    policy = get_policy(name, allow_leak=True, grid=GRID)
    proof, mask = prove(policy, row, layers), dense_mask(policy, row)
    paths = (proof.leak, proof.inexact)
    assert tuple(path and path.layer for path in paths) == closure(policy, row, layers)
    for path in filter(None, paths):
        assert len(path.tokens) == path.layer + 1
        assert all(mask[i, j] for i, j in zip(path.tokens, path.tokens[1:], strict=False))


LAYERED = ["mma+0:1=mixed+2:4=prefix", "causal+1:2=image_tokens", "mixed+0:2=mma_unclamped", "image_tokens+0:3=mma"]


@pytest.mark.parametrize("name", LAYERED)
@given(row=rows, layers=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_proof_follows_the_policy_of_each_layer(name: str, row: Sidecars, layers: int) -> None:
    policy = get_policy(name, allow_leak=True)
    proof = prove(policy, row, layers)
    paths = (proof.leak, proof.inexact)
    assert tuple(path and path.layer for path in paths) == closure(policy, row, layers)
    for path in filter(None, paths):
        assert len(path.tokens) == path.layer + 1
        steps = zip(path.tokens, path.tokens[1:], strict=False)
        depths = reversed(range(path.layer))
        assert all(dense_mask(policy.at(depth), row)[i, j] for depth, (i, j) in zip(depths, steps, strict=True))


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.leaks])
@given(row=rows)
@settings(max_examples=15, deadline=None)
def test_safe_policies_are_proved_at_any_depth(name: str, row: Sidecars) -> None:
    proof = prove(get_policy(name, grid=GRID), row, layers=64)
    assert proof.leak_free and proof.kv_exact


@pytest.mark.parametrize(
    ("name", "layout", "layers", "tokens"),
    [
        pytest.param("mma_unclamped", "V1 Q1 A1", 2, (1, 0, 2), id="one-turn-in-two-layers"),
        pytest.param("mma_unclamped", "V1 A1", 1, (0, 1), id="a-caption-in-one"),
        pytest.param("image_to_answer", "V1 Q1 A1", 2, (1, 0, 2), id="image-sees-answer"),
        pytest.param("image_tokens", "V1 Q1 A2 V1 Q1 A1", 3, (1, 0, 4, 3), id="images-of-all-turns-in-three"),
    ],
)
def test_leaks_of_the_literal_forms(name: str, layout: str, layers: int, tokens: tuple[int, ...]) -> None:
    policy = get_policy(name, allow_leak=True)
    proof = prove(policy, parse_layout(layout), layers=4)
    assert proof.leak is not None
    assert (proof.leak.layer, proof.leak.tokens) == (layers, tokens)
    assert layers == 1 or prove(policy, parse_layout(layout), layers - 1).leak_free


def test_images_that_read_every_question_leak_after_three_layers() -> None:
    """The trap of unlocking all turns: answer -> image -> later question -> answer."""
    policy = Policy(
        "every_question", "", lambda i, j: (i.modality == 1) & (j.modality == 0) & (j.generated == 0), leaks=True
    )
    proof = prove(policy, parse_layout("V1 Q1 A2 Q1 A1"), layers=3)
    assert proof.leak is not None
    assert proof.leak.tokens == (1, 0, 4, 3)
    assert "token 1 reads token 3 after layer 3 (1 -> 0 -> 4 -> 3)" in str(proof.leak)


def test_a_proof_of_a_long_row_is_quick() -> None:
    row = parse_layout(" | ".join(["S4 V144 Q40 A50 Q20 A90"] * 12))
    start = time.perf_counter()
    assert prove("mma", row, layers=32).leak_free
    assert time.perf_counter() - start < 0.5


def test_a_proof_needs_a_layer() -> None:
    with pytest.raises(UserError, match="at least one layer"):
        prove("mma", parse_layout("V1 Q1"), layers=0)


def test_rows_of_a_pack_folder_are_checked(packs: PackReader) -> None:
    assert check_rows(get_policy("mma"), packs, range(2), layers=8) == 2
    with pytest.raises(
        UserError, match=r"leaks answers in row 0 of .*token 4 reads token 7 after layer 2 \(4 -> 0 -> 7\)"
    ):
        check_rows(get_policy("image_to_answer", allow_leak=True), packs, range(2), layers=8)
