"""Pictures of masks: the meaning of every cell, and the files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from matplotlib.text import Text
from PIL import Image

from data_prep.common.errors import UserError
from pipeline.masks import get_policy, parse_layout
from pipeline.masks.layout import layout_letters
from pipeline.masks.picture import CELLS, FOOTNOTE, Cell, cells, draw_png, plain, runs_of, terminal, terminal_legend

H, C, U, L, X = Cell.HIDDEN, Cell.CAUSAL, Cell.UNLOCKED, Cell.LEAK, Cell.CLOSED


@pytest.mark.parametrize(
    ("policy", "layout", "expected"),
    [
        pytest.param("mma", "V1 Q1 A1", [[C, U, H], [C, C, H], [C, C, C]], id="unlocked"),
        pytest.param("image_to_answer", "V1 Q1 A1", [[C, U, L], [C, C, H], [C, C, C]], id="leak"),
        pytest.param("mma", "V1 Q1 P1", [[C, U, H], [C, C, H], [H, H, H]], id="padding"),
    ],
)
def test_cells_by_hand(policy: str, layout: str, expected: list[list[int]]) -> None:
    assert cells(get_policy(policy, allow_leak=True), parse_layout(layout)).tolist() == expected


def test_concentric_attention_closes_some_earlier_tokens() -> None:
    grid = cells(get_policy("cca", grid=(3, 3)), parse_layout("V9 Q1"))
    assert grid[8, 4] == X and grid[4, 8] == U  # the centre sees the last corner, not the other way round


def test_runs_are_named_as_in_the_layout() -> None:
    layout = "Q3 V4 V4 W2 U1 Q2 A3 Q1 P2"
    assert " ".join(run.label for run in runs_of(parse_layout(layout))) == layout


@pytest.mark.parametrize("layout", ["V16 Q7 A6 | V9 Q2 A1 P3", "V144 Q40 A60 Q20 A90 |" * 12])
def test_a_png_shows_every_kind_of_cell(layout: str, tmp_path: Path) -> None:
    target = tmp_path / "pictures" / "mask.png"
    start = time.perf_counter()
    draw_png([get_policy(name, allow_leak=True) for name in ("mma", "image_to_answer")], parse_layout(layout), target)
    assert time.perf_counter() - start < 20
    image = Image.open(target).convert("RGB")
    colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.getcolors(image.width * image.height)}
    assert {CELLS[cell][0] for cell in (H, C, U, L)} <= colours
    assert image.width > 2 * 960


def test_a_picture_names_system_text_and_has_one_footnote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(
        "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png",
        lambda canvas, path: texts.extend(text.get_text() for text in canvas.figure.findobj(Text)),
    )
    layout = "S4 Q2 V8 Q4 A2"
    policies = [get_policy(name) for name in ("causal", "mma", "prefix")]
    draw_png(policies, parse_layout(layout), tmp_path / "mask.png", layout_letters(layout))
    assert texts.count(FOOTNOTE) == 1
    assert texts.count("S4") == texts.count("Q4") == 2 * len(policies) and "Q6" not in texts
    assert runs_of(parse_layout(layout))[0].label == "Q6"  # a pack row does not mark system text


def test_rows_too_long_to_draw_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 16384 tokens, the row has 20000"):
        draw_png([get_policy("mma")], parse_layout("Q20000"), tmp_path / "mask.png")


@pytest.mark.parametrize(("layout", "size"), [("V3 Q2 A2", 7), ("V300 Q200 A50", 58)])
def test_the_terminal_view_has_two_rows_per_line(layout: str, size: int) -> None:
    lines = terminal(get_policy("mma"), parse_layout(layout), columns=60).plain.splitlines()
    assert lines[0].startswith("mma: ")
    assert len(lines[1]) == size + 2 and set(lines[1].strip()) == set("VQA")
    assert len(lines) == 2 + -(-size // 2)
    assert all(line[2:] == "▀" * size for line in lines[2:])
    assert "unlocked" in terminal_legend().plain


def test_without_colours_the_mask_is_drawn_in_ascii() -> None:
    lines = plain(get_policy("mma"), parse_layout("V2 Q2 A1"), columns=60).splitlines()
    assert lines[1:] == ["  VVQQA", "V . ##", "V ..##", "Q ...", "Q ....", "A ....."]
    assert len(plain(get_policy("mma"), parse_layout("V64 Q64 A64"), columns=40).splitlines()) == 2 + 38


def test_packed_samples_are_separated_in_ascii() -> None:
    layout = "S1 V1 Q1 | Q1 A1 P1"
    lines = plain(get_policy("mma"), parse_layout(layout), 60, layout_letters(layout)).splitlines()
    rule = "  ---+--+-"
    assert lines[1:] == [
        "  SVQ|QA|P",
        "S .  |  |",
        "V ..#|  |",
        "Q ...|  |",
        rule,
        *("Q    |. |", "A    |..|"),
        rule,
        "P    |  |",
    ]
    pooled = plain(get_policy("mma"), parse_layout("V64 Q64 A64 | Q64 A9"), columns=40)
    assert max(map(len, pooled.splitlines()[1:])) == 40 and pooled.isascii()
