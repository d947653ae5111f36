"""Values of rows: options, boxes and file names against plain rules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.corpora.choices import Options, shuffle_options
from data_prep.corpora.fields import find_image, normalised_box
from data_prep.quarantine import BadSample


@given(texts=st.lists(st.text(min_size=1), min_size=2, max_size=8, unique=True), key=st.text(), data=st.data())
def test_the_letter_follows_the_correct_option(texts: list[str], key: str, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, len(texts) - 1))
    shown = shuffle_options(Options(tuple(texts), ascii_uppercase[right]), key)
    assert sorted(shown.texts) == sorted(texts)
    assert shown.texts[ascii_uppercase.index(shown.answer)] == texts[right]
    assert shown == shuffle_options(Options(tuple(texts), ascii_uppercase[right]), key)


def test_the_correct_option_appears_equally_often_under_every_letter() -> None:
    letters = Counter(
        shuffle_options(Options(("a", "b", "c", "d"), "A"), f"question {number}").answer for number in range(800)
    )
    assert set(letters) == set("ABCD")
    assert max(letters.values()) - min(letters.values()) < 80


@pytest.mark.parametrize(
    ("xywh", "size", "expected"),
    [
        pytest.param([16, 12, 32, 24], (64, 48), "<bbox>[0.250, 0.250][0.750, 0.750]</bbox>", id="inside"),
        pytest.param([-5, -5, 100, 100], (64, 48), "<bbox>[0.000, 0.000][1.000, 1.000]</bbox>", id="clipped"),
        pytest.param([1, 1, 1, 1], (3, 3), "<bbox>[0.333, 0.333][0.667, 0.667]</bbox>", id="rounded"),
    ],
)
def test_boxes_are_written_in_fractions(xywh: list[float], size: tuple[int, int], expected: str) -> None:
    assert str(normalised_box(xywh, *size)) == expected


@pytest.mark.parametrize(
    ("xywh", "size"),
    [
        pytest.param([70, 0, 5, 5], (64, 48), id="outside"),
        pytest.param([1, 1, 0, 5], (64, 48), id="flat"),
        pytest.param([1, 1, -3, 5], (64, 48), id="negative"),
        pytest.param([1, 1, 0.01, 5], (64, 48), id="vanishes-in-rounding"),
        pytest.param([1, 1, float("nan"), 5], (64, 48), id="nan"),
        pytest.param([1, 1, 5], (64, 48), id="three-numbers"),
        pytest.param([1, 1, 5, 5, 5], (64, 48), id="five-numbers"),
        pytest.param([1, 1, 5, 5], (0, 48), id="no-image"),
    ],
)
def test_empty_boxes_are_rejected(xywh: list[float], size: tuple[int, int]) -> None:
    with pytest.raises(BadSample, match="bad-box"):
        normalised_box(xywh, *size)


@given(
    xywh=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
    width=st.integers(1, 10_000),
    height=st.integers(1, 10_000),
)
def test_a_box_never_leaves_the_image(xywh: list[float], width: int, height: int) -> None:
    try:
        box = normalised_box(xywh, width, height)
    except BadSample:
        return
    assert 0 <= box.left < box.right <= 1
    assert 0 <= box.top < box.bottom <= 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("../a.jpg", "unsafe-path", id="climbs"),
        pytest.param("b/../../a.jpg", "unsafe-path", id="climbs-later"),
        pytest.param("..\\a.jpg", "unsafe-path", id="climbs-in-windows"),
        pytest.param("/etc/passwd", "unsafe-path", id="absolute"),
        pytest.param("", "unsafe-path", id="empty"),
        pytest.param("link.jpg", "unsafe-path", id="link-out"),
        pytest.param("folder", "missing-image", id="folder"),
        pytest.param("gone.jpg", "missing-image", id="gone"),
        pytest.param("a\0.jpg", "bad-encoding", id="nul"),
        pytest.param("x" * 5000, "missing-image", id="name-too-long"),
    ],
)
def test_image_names_stay_in_their_folder(name: str, code: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "folder").mkdir(parents=True)
    (tmp_path / "a.jpg").write_bytes(b"secret")
    (images / "link.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(BadSample) as caught:
        find_image(images, name)
    assert caught.value.code == code


def test_a_link_within_the_folder_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert find_image(tmp_path, "b.jpg").read() == b"picture"
