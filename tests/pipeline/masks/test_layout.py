"""Layout strings."""

from __future__ import annotations

import pytest

from data_prep.common.errors import UserError
from pipeline.masks import parse_layout
from pipeline.masks.layout import layout_letters, parse_grid


def test_letters_counts_segments_and_padding() -> None:
    row = parse_layout("s v2w1 Q2A1 | U1 a1 P2 Q1")
    assert row.segment.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 3]
    assert row.modality.tolist() == [0, 1, 1, 2, 0, 0, 0, 3, 0, 0, 0, 0]
    assert row.instance.tolist() == [-1, 0, 0, 1, -1, -1, -1, 2, -1, -1, -1, -1]
    assert row.generated.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("V4 X3", "'X3'"),
        ("V4, Q2", "','"),
        ("12", "'1'"),
        ("", "holds no tokens"),
        ("V0 |", "holds no tokens"),
        ("V999999999", "at most 1,048,576 tokens"),
        (f"V{'9' * 6000}", "at most 1,048,576 tokens"),
    ],
)
def test_unreadable_layouts_are_refused_by_part(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse_layout(text)


def test_letters_keep_system_text() -> None:
    assert layout_letters("s v2w1 Q2A1 | U1 P2 Q03") == "SVVWQQAUPPQQQ"


@pytest.mark.parametrize("text", ["27x27", " 27X27 "])
def test_grids(text: str) -> None:
    assert parse_grid(text) == (27, 27)


@pytest.mark.parametrize("text", ["", "27", "0x3", "2by2", "-1x3", "1x99999", "\u0663x3"])
def test_unreadable_grids_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as 27x27"):
        parse_grid(text)
