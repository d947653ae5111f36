"""Layout strings."""

from __future__ import annotations

import pytest

from data_prep.common.errors import UserError
from pipeline.masks import parse_layout


def test_letters_counts_segments_and_padding() -> None:
    row = parse_layout("s v2w1 Q2A1 | U1 a1 P2 Q1")
    assert row.segment.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 3]
    assert row.modality.tolist() == [0, 1, 1, 2, 0, 0, 0, 3, 0, 0, 0, 0]
    assert row.instance.tolist() == [-1, 0, 0, 1, -1, -1, -1, 2, -1, -1, -1, -1]
    assert row.generated.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "batch"),
    [("V4 X3", "'X3'"), ("V4, Q2", "','"), ("12", "'1'"), ("", "holds no tokens"), ("V0 |", "holds no tokens")],
)
def test_unreadable_layouts_are_refused_by_part(text: str, batch: str) -> None:
    with pytest.raises(UserError, match=batch):
        parse_layout(text)
