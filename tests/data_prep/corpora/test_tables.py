"""Tables and fields of the readers: lazy JSON against ``json``, boxes and file names against plain rules."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.common.errors import UserError
from data_prep.corpora import tables
from data_prep.corpora.base import Malformed
from data_prep.corpora.choices import Options, shuffle_options
from data_prep.corpora.fields import find_image, normalised_box
from data_prep.quarantine import BadSample

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
IN_A_TMP_PATH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@IN_A_TMP_PATH
@given(
    rows=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    chunk=st.integers(24, 64),
)
def test_a_streamed_list_equals_the_parsed_list(
    rows: list[Any], indent: int | None, ascii_only: bool, bom: bool, chunk: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    content = "\ufeff" * bom + json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK_BYTES", chunk)
        streamed = list(tables.json_array(path))
    assert streamed == json.loads(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"))


@IN_A_TMP_PATH
@given(
    members=st.dictionaries(st.text(max_size=6), VALUES, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(24, 64),
)
def test_streamed_members_equal_the_parsed_object(
    members: dict[str, Any], indent: int | None, ascii_only: bool, chunk: int, tmp_path: Path
) -> None:
    path = tmp_path / "members.json"
    path.write_text(json.dumps(members, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK_BYTES", chunk)
        streamed = list(tables.json_members(path))
    assert streamed == [{key: value} for key, value in members.items()]


@IN_A_TMP_PATH
@given(rows=st.lists(VALUES, min_size=1, max_size=6), data=st.data())
def test_rows_are_read_by_number_and_by_slice(rows: list[Any], data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    table = tables.json_array(path)
    number = data.draw(st.integers(-len(rows), len(rows) - 1))
    part = data.draw(st.slices(len(rows)))
    assert len(table) == len(rows)
    assert table[number] == rows[number]
    assert table[part] == rows[part]


@IN_A_TMP_PATH
@given(rows=st.lists(VALUES, max_size=6), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_lines_are_rows_and_empty_lines_are_skipped(rows: list[Any], end: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(json.dumps(row) for row in rows).encode())
    assert list(tables.json_lines(path)) == rows


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert list(tables.json_lines(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    for order in ("utf-16-le", "utf-16-be"):
        (tmp_path / "wide.jsonl").write_bytes('\ufeff{"a": 1}\n'.encode(order))
        with pytest.raises(
            UserError, match=r"wide\.jsonl: UTF-16 text, but JSON is UTF-8; convert it: iconv -f UTF-16"
        ):
            tables.json_lines(tmp_path / "wide.jsonl")


def test_a_bad_line_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    first, second, third, fourth, fifth = tables.json_lines(path)
    assert (first, third, fifth) == ({"a": 1}, {"a": "\udcff"}, {"a": 2})
    assert isinstance(second, Malformed)
    assert isinstance(fourth, Malformed)


def test_json_lines_that_are_named_json_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"expected a JSON list at the top level; JSON lines\? name it \.jsonl"):
        tables.json_array(tmp_path / "rows.json")


@pytest.mark.parametrize("content", ["", "{}", "3", "[1, 2", "[1, }", '["a'])
def test_a_list_that_is_missing_or_cut_short_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"rows\.json"):
        tables.json_array(path)


@pytest.mark.parametrize("content", ["", "[]", '{"a"', '{"a": 1', '{"a" 1}'])
def test_an_object_that_is_missing_or_cut_short_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"members\.json"):
        tables.json_members(path)


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
