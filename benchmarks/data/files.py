"""``files``: what each step asks of the file system, counted by strace on small corpora and extrapolated.

Every step runs for two numbers of raw shards S and two numbers of shares R (ranks or array tasks). The count of an
operation is then ``a + b S + c R + d S R``, which four runs determine; a fifth, larger one checks it. The extrapolation
assumes that nothing else grows. With several shares, the step after ingest completes the image store.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.data.memory import write_corpus

STEPS = ("ingest", "plan", "materialize")
KINDS = ("open", "list", "stat", "rename", "remove")
PER_TAR = 4
_CALLS = {
    "openat": "open", "open": "open", "newfstatat": "stat", "stat": "stat", "lstat": "stat", "statx": "stat",
    "access": "stat", "faccessat2": "stat", "rename": "rename", "renameat": "rename", "renameat2": "rename",
    "unlink": "remove", "unlinkat": "remove", "rmdir": "remove",
}  # fmt: skip
_LINE = re.compile(r'^\d+ +(\w+)\(.*?"([^"]*)"(.*)$')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, nargs=3, default=[3, 5, 8], help="raw shards of the runs")
    parser.add_argument("--ranks", type=int, nargs=3, default=[2, 3, 4], help="shares of the runs")
    parser.add_argument("--to", type=int, nargs=2, default=[10_000, 1_000], metavar=("S", "R"), help="extrapolate to")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table, line by line."""
    shards, ranks = options.shards, options.ranks
    corners = list(itertools.product(shards[:2], ranks[:2]))
    counted = {sizes: counts_of(*sizes) for sizes in [*corners, (shards[2], ranks[2])]}
    check, far = (shards[2], ranks[2]), tuple(options.to)
    yield f"| step | operation | counted at {check[0]} x {check[1]} | by the rule | rule | {far[0]:,} x {far[1]:,} |"
    yield "|---|---|---:|---:|---|---:|"
    for step, kind in itertools.product(STEPS, KINDS):
        rule = fit({sizes: counted[sizes][step][kind] for sizes in corners})
        if any(rule):
            cells = [f"{counted[check][step][kind]:,}", f"{value(rule, *check):,.0f}", shown(rule)]
            yield f"| {step} | {kind} | {' | '.join(cells)} | {value(rule, *far):,.0f} |"


def fit(counts: Mapping[tuple[int, int], int]) -> list[float]:
    """Return a, b, c, d of ``a + b S + c R + d S R`` through four counts."""
    sizes = np.array([[1, shards, ranks, shards * ranks] for shards, ranks in counts], dtype=np.float64)
    return [
        float(round(number, 4)) for number in np.linalg.solve(sizes, np.array([*counts.values()], dtype=np.float64))
    ]


def value(rule: list[float], shards: int, ranks: int) -> float:
    """Return what a rule says for so many shards and ranks."""
    return rule[0] + rule[1] * shards + rule[2] * ranks + rule[3] * shards * ranks


def shown(rule: list[float]) -> str:
    """Return a rule as ``3 + 2 S + 5 R``."""
    words = [f"{number:g}{name}" for number, name in zip(rule, ("", " S", " R", " S R"), strict=True) if number]
    return " + ".join(words).replace("+ -", "- ")


def counts_of(shards: int, ranks: int) -> dict[str, Counter[str]]:
    """Run every step on a corpus of so many shards, by so many shares; return the operations of all shares together."""
    counts = {step: Counter[str]() for step in STEPS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_corpus(folder, shards * PER_TAR, per_tar=PER_TAR)
        for step in STEPS:
            alone = step == "plan"
            for rank in range(1 if alone else ranks):
                share = [] if alone else ["--shard", f"{rank}/{ranks}"]
                words = ["-m", "data_prep", step, str(recipe), "--workers", "1", *share]
                counts[step] += traced(words, folder)
    return counts


def traced(words: list[str], folder: Path) -> Counter[str]:
    """Run Python with these words under strace; return its operations on files of a folder."""
    log = folder.with_name(folder.name + ".strace")
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", f"trace={','.join(f'?{call}' for call in _CALLS)}"]
    try:
        done = subprocess.run(
            [*command, "-o", str(log), sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed\n{done.stdout[-2000:]}")
        return Counter(kind for line in log.read_text().splitlines() if (kind := operation(line, folder)))
    finally:
        log.unlink(missing_ok=True)


def operation(line: str, folder: Path) -> str | None:
    """Return the kind of a line of strace; None for other files."""
    found = _LINE.match(line)
    if found is None or not found[2].startswith(str(folder)):
        return None
    kind = _CALLS[found[1]]
    return "list" if kind == "open" and "O_DIRECTORY" in found[3] else kind
