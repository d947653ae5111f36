"""JSON files in any layout against the plain parser; nothing in a file is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.common.errors import UserError
from data_prep.corpora import json_files
from data_prep.corpora.base import Malformed

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
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        streamed = list(json_files.json_array(path))
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
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        streamed = list(json_files.json_members(path))
    assert streamed == [{key: value} for key, value in members.items()]


@IN_A_TMP_PATH
@given(rows=st.lists(VALUES, min_size=1, max_size=6), data=st.data())
def test_rows_are_read_by_number_and_by_slice(rows: list[Any], data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    table = json_files.json_array(path)
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
    assert list(json_files.json_lines(path)) == rows


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert list(json_files.json_lines(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    for order in ("utf-16-le", "utf-16-be"):
        (tmp_path / "wide.jsonl").write_bytes('\ufeff{"a": 1}\n'.encode(order))
        with pytest.raises(
            UserError, match=r"wide\.jsonl: UTF-16 text, but JSON is UTF-8; convert it: iconv -f UTF-16"
        ):
            json_files.json_lines(tmp_path / "wide.jsonl")


def test_a_bad_line_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    first, second, third, fourth, fifth = json_files.json_lines(path)
    assert (first, third, fifth) == ({"a": 1}, {"a": "\udcff"}, {"a": 2})
    assert isinstance(second, Malformed)
    assert isinstance(fourth, Malformed)


@pytest.mark.parametrize("content", ["", "{}", "3", "[1, 2", "[1, }", '["a'])
def test_a_list_that_is_missing_or_cut_short_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"rows\.json"):
        json_files.json_array(path)


@pytest.mark.parametrize("content", ["", "[]", '{"a"', '{"a": 1', '{"a": [1}, "b": 2}'])
def test_an_object_that_is_missing_or_cut_short_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"members\.json"):
        json_files.json_members(path)


ROWS = [{"a": 1, "b": [1, 2]}, {"a": 2, "b": ["}", "]"]}, {"a": 3}]
LAYOUTS = {
    "list": json.dumps(ROWS),
    "pretty list": json.dumps(ROWS, indent=1),
    "two lists": json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:]),
    "lists with byte order marks": "\ufeff" + json.dumps(ROWS[:2]) + "\ufeff" + json.dumps(ROWS[2:]),
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines behind a byte order mark": "\ufeff" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "objects": "".join(map(json.dumps, ROWS)),
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_all_rows(
    layout: str, chunk: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK_BYTES", chunk)
    path = tmp_path / f"rows.{suffix}"
    path.write_text(LAYOUTS[layout], encoding="utf-8")
    assert list(json_files.json_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('[{"a": 1}] garbage', r"unexpected data after the list, at byte 11", id="garbage"),
        pytest.param('[{"a": 1}]\0\0', r"unexpected data after the list, at byte 10", id="zeros"),
        pytest.param('[{"a": 1}]{"a": 2}', r"unexpected data after the list, at byte 10", id="object after a list"),
        pytest.param('{\n"a": 1}\n[{"a": 2}]', r"expected a JSON object at byte 10", id="list after an object"),
        pytest.param('{"a": 1}', r"found a single object", id="one object"),
        pytest.param("[1, 2] [3, 4", r"cut short, from byte 11", id="second list cut"),
    ],
)
def test_what_is_no_row_is_refused_with_its_byte(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=rf"rows\.json: .*{message}"):
        json_files.json_rows(tmp_path / "rows.json")


def test_two_dictionaries_in_one_file_are_both_read(tmp_path: Path) -> None:
    (tmp_path / "members.json").write_text('{"a": 1}\n{"b": 2, "c": 3}')
    assert list(json_files.json_members(tmp_path / "members.json")) == [{"a": 1}, {"b": 2}, {"c": 3}]
    (tmp_path / "members.json").write_text('{"a": 1}]')
    with pytest.raises(UserError, match="unexpected data after the object, at byte 8"):
        json_files.json_members(tmp_path / "members.json")


@pytest.mark.parametrize(
    "bad", ['{"a": nul}', '{"a": }', "{'a': 1}", '{"a": 1} {"a": 1}', '"\x01"', "[" * 5000 + "]" * 5000]
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_an_unreadable_element_spoils_only_itself(
    bad: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK_BYTES", chunk)
    (tmp_path / "rows.json").write_text(f'[{{"a": 1}}, {bad}, {{"a": 2}}]')
    first, second, third = json_files.json_array(tmp_path / "rows.json")
    assert (first, third) == ({"a": 1}, {"a": 2}) and isinstance(second, Malformed)
    (tmp_path / "members.json").write_text(f'{{"x": 1, "y": {bad}, "z": 2}}')
    first, second, third = json_files.json_members(tmp_path / "members.json")
    assert (first, third) == ({"x": 1}, {"z": 2}) and isinstance(second, Malformed)


def test_a_row_without_an_end_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 1 << 14)
    (tmp_path / "rows.json").write_text('[{"a": 1}, {"a": "' + "x" * 10**6)
    with pytest.raises(UserError, match=r"the row at byte 11 exceeds 16,384 bytes"):
        json_files.json_rows(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 10**6 + '"}\n{"a": 2}')
    first, second, third = json_files.json_rows(tmp_path / "rows.jsonl")
    assert (first, third) == ({"a": 1}, {"a": 2}) and isinstance(second, Malformed) and second.code == "too-large"
