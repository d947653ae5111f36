"""``memory``: peak memory of every step, each a process of its own, against the size of the corpus."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

STEPS = ("ingest", "plan", "materialize", "verify")
PER_TAR = 10_000
SHARED = 10
"""Every so many samples share their image with samples of other tars."""
_EVERY_S = 0.02


class Peak(NamedTuple):
    """Peak memory of a process in MiB, and its time."""

    own: float
    """What it asked for: anonymous pages, sampled."""
    resident: float
    """With the pages of mapped files that were in memory anyway."""
    seconds: float
    """Of the processor."""

    def __str__(self) -> str:
        return f"{self.own:,.0f} ({self.resident:,.0f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--shares", type=int, default=1, help="shares of ingest, run in sequence (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table, line by line."""
    yield f"| samples | {' | '.join(f'{step} MiB' for step in STEPS)} |"
    yield f"|---:|{'---:|' * len(STEPS)}"
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_corpus(Path(folder), samples)
            cells = [str(peak_of(step, recipe, options.shares)) for step in STEPS]
        yield f"| {samples:,} | {' | '.join(cells)} |"


def peak_of(step: str, recipe: Path, shares: int) -> Peak:
    """Run a step in one process, ingest in so many; return the peak of the largest."""
    if step == "verify":
        return measured([step, str(recipe.parent / "out")])
    words = [step, str(recipe), "--workers", "1"]
    if step != "ingest" or shares == 1:
        return measured(words)
    peaks = [measured([*words, "--shard", f"{share}/{shares}"]) for share in range(shares)]
    return Peak(*map(max, zip(*peaks, strict=True)))


def measured(words: list[str]) -> Peak:
    """Run ``mma-prep`` with these words in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", "data_prep", *words], stdout=subprocess.DEVNULL)
    own = 0.0
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        own = max(own, _anonymous_mib(process.pid))
        time.sleep(_EVERY_S)
    if ended[1]:
        raise SystemExit(f"mma-prep {' '.join(words)} failed")
    return Peak(own, ended[2].ru_maxrss / 1024, ended[2].ru_utime + ended[2].ru_stime)


def _anonymous_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def write_corpus(folder: Path, samples: int, *, per_tar: int = PER_TAR) -> Path:
    """Write tars of captions with tiny images, and a recipe."""
    raw = folder / "raw"
    raw.mkdir()
    for number, start in enumerate(range(0, samples, per_tar)):
        with tarfile.open(raw / f"{number:05d}.tar", "w") as tar:
            for key in range(start, min(start + per_tar, samples)):
                _add(tar, f"{key:09d}.png", _image(key % 1000 if key % SHARED == 0 else key))
                _add(
                    tar, f"{key:09d}.txt", f"a picture of {key % 97} red and {key % 89} green balls on a table".encode()
                )
    content = {
        "root": str(raw),
        "out": str(folder / "out"),
        "tokenizer": {"train": {"vocab_size": 400, "samples": 2000}},
        "image_tokens": 144,
        "corpora": {"captions": {"type": "webdataset", "tars": "*.tar"}},
        "packs": {"pt": {"corpora": ["captions"], "template": "caption", "seq_len": 2048, "epochs": 1}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _image(number: int) -> bytes:
    """Two times two pixels of one colour, in the simplest format."""
    return b"P6 2 2 255\n" + number.to_bytes(3) * 4
