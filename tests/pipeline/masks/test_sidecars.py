"""Sidecars: derived columns, joined rows, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from data_prep.common.errors import UserError
from data_prep.packs import PackRow
from pipeline.masks import Sidecars, commit_index, dense_mask, parse_layout, position_ids
from tests.pipeline.masks.rows import PlainRow, rows


def sidecars(**changes: list[int]) -> Sidecars:
    columns = {
        "segment": [1, 1, 1, 0],
        "modality": [1, 0, 0, 0],
        "instance": [0, -1, -1, -1],
        "generated": [0, 0, 1, 0],
    }
    return Sidecars(**{name: torch.tensor(values) for name, values in (columns | changes).items()})


@pytest.mark.parametrize(
    ("layout", "commit", "positions"),
    [
        pytest.param("V2 Q1 A2", [2, 2, 2, 3, 4], [0, 1, 2, 3, 4], id="one-turn"),
        pytest.param("Q1 V1 A1 Q2 A1", [1, 1, 2, 4, 4, 5], [0, 1, 2, 3, 4, 5], id="text-first-two-turns"),
        pytest.param("V2 A2", [1, 1, 2, 3], [0, 1, 2, 3], id="caption"),
        pytest.param("V1 Q1 | Q1 A1 P2", [1, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 0], id="packed-and-padded"),
        pytest.param("Q1", [0], [0], id="one-token"),
    ],
)
def test_commit_and_positions_by_hand(layout: str, commit: list[int], positions: list[int]) -> None:
    row = parse_layout(layout)
    assert commit_index(row).tolist() == commit
    assert position_ids(row).tolist() == positions


@given(rows)
@settings(max_examples=40, deadline=None)
def test_commit_index_agrees_with_a_walk_over_the_tokens(row: Sidecars) -> None:
    plain = PlainRow(row)
    assert commit_index(row).tolist() == [plain.commit(i) for i in range(len(row))]


def test_tokens_of_a_ring_share_a_position_and_text_continues_after_the_last() -> None:
    row = parse_layout("Q1 V9 Q2 | V9 A1")
    rings = [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert position_ids(row, grid=(3, 3)).tolist() == [0, *(1 + ring for ring in rings), 3, 4, *rings, 2]


def test_joined_rows_keep_their_masks_and_number_media_consecutively() -> None:
    one, two = parse_layout("V2 Q1 A1 | Q2 P3"), parse_layout("V2 V1 Q1 P1")
    joined = Sidecars.concat([one, two])
    assert dense_mask("mma", joined).equal(torch.block_diag(dense_mask("mma", one), dense_mask("mma", two)).bool())
    assert joined.instance[joined.instance >= 0].tolist() == [0, 0, 1, 1, 2]
    assert position_ids(joined).equal(torch.cat([position_ids(one), position_ids(two)]))


def test_a_pack_row_becomes_sidecars() -> None:
    row = PackRow(
        input_ids=np.array([5, 6, 7], np.int32),
        modality=np.array([1, 0, 0], np.int8),
        segment=np.array([1, 1, 0], np.int32),
        instance=np.array([0, -1, -1], np.int16),
        generated=np.array([0, 1, 0], np.uint8),
        image_row=np.array([3]),
        n_target=1,
        source=(),
    )
    assert commit_index(Sidecars.from_row(row)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"segment": [1, 1, 1]}, "equal lengths", id="lengths"),
        pytest.param({"segment": [1, 2, 1, 0]}, "segment 1 is not contiguous", id="interleaved"),
        pytest.param({"segment": [1, 1, 1, -1]}, "token 3 has a segment below 0", id="negative-segment"),
        pytest.param({"modality": [7, 0, 0, 0]}, "token 0 has a modality outside 0..3", id="modality"),
        pytest.param({"generated": [0, 0, 2, 0]}, "token 2 has a generated that is neither", id="generated"),
        pytest.param({"generated": [1, 0, 1, 0]}, "token 0 has a generated medium", id="generated-image"),
        pytest.param({"instance": [0, 4, -1, -1]}, "token 1 has a text with an instance", id="instance"),
    ],
)
def test_damaged_sidecars_are_refused_by_token(changes: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sidecars(**changes)


def test_batched_or_float_sidecars_are_refused() -> None:
    with pytest.raises(UserError, match=r"segment must be a 1-D integer tensor.*Sidecars\.concat"):
        Sidecars(*(torch.zeros(2, 3, dtype=torch.long) for _ in range(4)))
    with pytest.raises(UserError, match=r"1-D integer tensor, got torch\.float32"):
        Sidecars(*(torch.zeros(3) for _ in range(4)))
    with pytest.raises(UserError, match="no rows"):
        Sidecars.concat([])
