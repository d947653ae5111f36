"""The rule that extrapolates operations on files, and the lines of strace it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.files import fit, operation, shown, value


def test_a_rule_is_found_from_four_counts_and_meets_others() -> None:
    counts = {(s, r): 7 + 2 * s + 3 * r + 5 * s * r for s in (3, 5) for r in (2, 3)}
    rule = fit(counts)
    assert rule == [7, 2, 3, 5] and shown(rule) == "7 + 2 S + 3 R + 5 S R"
    assert value(rule, 10_000, 1_000) == 7 + 20_000 + 3_000 + 50_000_000


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('12 openat(AT_FDCWD, "/d/out/a", O_RDONLY|O_CLOEXEC) = 3', "open"),
        ('12 openat(AT_FDCWD, "/d/out", O_RDONLY|O_NONBLOCK|O_CLOEXEC|O_DIRECTORY) = 3', "list"),
        ('12 rename("/d/out/a.tmp", "/d/out/a") = 0', "rename"),
        ('12 newfstatat(AT_FDCWD, "/d/out/a", 0x7, 0) = -1 ENOENT (No such file or directory)', "stat"),
        ('12 openat(AT_FDCWD, "/usr/lib/python", O_RDONLY) = 3', None),
        ("12 +++ exited with 0 +++", None),
    ],
)
def test_lines_of_strace_are_told_apart(line: str, kind: str | None) -> None:
    assert operation(line, Path("/d")) == kind
