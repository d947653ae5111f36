"""Hostile and unlucky YAML: one clear line, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.yaml_files import MAX_BYTES, read_mapping, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(BOMB, r"aliases expand to more than 100,000 values \(line 16\)", id="alias-bomb"),
        pytest.param(MERGE_BOMB, r"aliases expand to more than 100,000 values", id="merge-bomb"),
        pytest.param("a: &a [*a]", r"a value contains itself through an alias \(line 1\)", id="recursive-list"),
        pytest.param("x: 1\na: &a {b: *a}", r"contains itself through an alias \(line 2\)", id="recursive-mapping"),
        pytest.param("a: " + "[" * 10_000, r"nested deeper than 32 levels \(line 1\)", id="deep-flow"),
        pytest.param("{a: " * 10_000, "nested deeper than 32 levels", id="deep-flow-mappings"),
        pytest.param("".join(f"{' ' * n}a:\n" for n in range(1_000)), "nested deeper than 32 levels", id="deep-block"),
        pytest.param("- " * 10_000 + "a", "nested deeper than 32 levels", id="deep-lists"),
        pytest.param("seed: " + "9" * 5_000, r"a number of 5,000 characters \(line 1\)", id="huge-number"),
        pytest.param("seed: 0x" + "f" * 5_000, "a number of 5,002 characters", id="huge-hex"),
        pytest.param("seed: 0b_", "not valid YAML", id="malformed-number"),
        pytest.param('a: 1\nroot: "x\\0y"', r"the character U\+0000 is not allowed \(line 2\)", id="escaped-nul"),
        pytest.param("root: x\0y", "special characters are not allowed", id="raw-nul"),
        pytest.param('root: "\\ud800"', r"the character U\+D800 is not allowed", id="surrogate"),
        pytest.param('"\\ud800": 1', r"the character U\+D800 is not allowed", id="surrogate-key"),
        pytest.param("a: !!timestamp 2026-01-01", r"the tag 'timestamp' is not supported \(line 1\)", id="tagged-date"),
        pytest.param("a: !!binary aGk=", "the tag 'binary' is not supported", id="binary"),
        pytest.param("a: !!python/object/apply:os.system [ls]", "the tag 'python/object/apply:os.system'", id="python"),
        pytest.param("? [a]\n: 1", "unhashable key", id="list-as-key"),
        pytest.param("a: *b", "undefined alias 'b'", id="unknown-alias"),
        pytest.param("a: 1\n---\nb: 1", "expected a single document", id="two-documents"),
    ],
)
def test_a_hostile_text_is_refused_in_one_line_at_once(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "r.yaml")
    assert str(caught.value).startswith("r.yaml: not valid YAML: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 2


def test_dates_stay_text_and_numbers_are_numbers() -> None:
    text = "{date: 2026-01-31, time: 2026-01-31T10:00:00Z, rate: 1e-6, big: 1e9, n: 12, shared: &x [1, 2], again: *x}"
    assert read_yaml(text, "") == {
        "date": "2026-01-31", "time": "2026-01-31T10:00:00Z", "rate": 1e-6, "big": 1e9, "n": 12, "shared": [1, 2],
        "again": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff", "cannot be read"),
        (b"#" * (MAX_BYTES + 1), "larger than 1,048,576 bytes: is it a recipe?"),
        (b"[1]", "a recipe is a mapping of sections, not a list"),
    ],
)
def test_a_file_that_cannot_be_a_recipe_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_mapping(tmp_path / "r.yaml")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("\ufeffseed: 1".encode())
    assert read_mapping(tmp_path / "r.yaml") == {"seed": 1}
