"""The walls of the house: which room imports which, how large things are, and which words are not used."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure import ROOT, Sizes, allowed_imports, imports, room

RIDDLES = re.compile(
    r"\b(anew|mend(s|ed|ing)?|guilty|forg[ia]ven?s?|blueprints?|verdicts?|replicas?|atoms?|intakes?|dialects?|fullness"
    r"|(un)?alterable|whole way|takes up only|made again|in thought|for ever)\b",
    re.IGNORECASE,
)
"""Words that the field has a standard term for."""
USER_TEXT = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "slurm/**/*.sh", "*/recipes/*.yaml", "ds_configs/*.json")
    for path in ROOT.glob(pattern)
)
CODE = sorted(
    path for folder in ("pipeline", "data_prep", "slurm", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def test_rooms_import_what_contributing_says() -> None:
    """The table is exact: an import it does not list fails, and so does a line nobody uses."""
    assert imports() == allowed_imports()


def test_no_import_runs_back_up() -> None:
    table = allowed_imports()
    rooms = list(table)
    for place, name in enumerate(rooms):
        assert table[name] <= set(rooms[:place]), f"{name} imports a room that stands below it in the table"


def test_every_room_is_in_the_table() -> None:
    found = {room(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in CODE}
    rooms = {name for name in found if name.split(".")[0] in ("pipeline", "data_prep") and "__init__" not in name}
    assert rooms == set(allowed_imports())


@pytest.mark.parametrize("row", Sizes.measure().rows(), ids=lambda row: row[0])
def test_sizes_are_within_the_limits(row: tuple[str, str, str, bool]) -> None:
    what, measured, limit, holds = row
    assert holds, f"{what}: {measured}, limit {limit}; python -m tests.structure names the places"


def test_texts_use_the_fields_words() -> None:
    assert not [
        f"{path.relative_to(ROOT)}: {word}" for path in USER_TEXT for word in _riddles(path.read_text(encoding="utf-8"))
    ]


def test_messages_docstrings_and_comments_use_the_fields_words() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in CODE
        for line, text in _prose(path)
        for word in _riddles(text)
    ]


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield strings and comments of a source file with their lines."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _riddles(text: str) -> Iterator[str]:
    return (found.group() for found in RIDDLES.finditer(" ".join(text.split())))
