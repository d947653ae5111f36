"""docs/scale.md holds what the command prints, and names the limits that it finds."""

from __future__ import annotations

import pytest

from benchmarks.scale import CASES, limit, lines, memory_gib, predict
from tests.launch import ROOT


@pytest.mark.slow
def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    text = (ROOT / "docs/scale.md").read_text()
    shown = text.partition("<!-- python -m benchmarks.scale -->\n")[2].partition("<!-- end -->")[0]
    assert shown.strip() == "\n".join(lines(["aki_4b", "70b"])).strip()


def test_each_fix_raises_the_speed_of_the_setting_it_fixes() -> None:
    one, two, whole, released = (predict(case) for case in (CASES[1], CASES[2], CASES[5], CASES[6]))
    assert limit(one).startswith("communication") and limit(two) == "-"
    assert two.tokens_per_s > one.tokens_per_s
    assert limit(whole) == "memory" and memory_gib(released) < 80 < memory_gib(whole)
