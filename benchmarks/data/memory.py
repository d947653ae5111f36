"""``memory``: peak memory of every step, each a process of its own, against the size of the corpus."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from PIL import Image

STEPS = ("ingest", "plan", "materialize", "verify")
PER_TAR = 10_000
SHARED = 10
"""Every so many samples share their image with samples of other tars."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table, line by line."""
    yield f"| samples | {' | '.join(f'{step} MiB' for step in STEPS)} |"
    yield f"|---:|{'---:|' * len(STEPS)}"
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            recipe = _write_corpus(Path(folder), samples)
            cells = [f"{_peak_mib(step, recipe if step != 'verify' else Path(folder) / 'out'):,.0f}" for step in STEPS]
        yield f"| {samples:,} | {' | '.join(cells)} |"


def _peak_mib(step: str, target: Path) -> float:
    """Run a step in one process; return its peak resident memory, mapped files included."""
    words = [sys.executable, "-m", "data_prep", step, str(target), *(["--workers", "1"] if step != "verify" else [])]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mma-prep {step} failed")
    return usage.ru_maxrss / 1024


def _write_corpus(folder: Path, samples: int) -> Path:
    """Write tars of captions with tiny images, and a recipe."""
    raw = folder / "raw"
    raw.mkdir()
    for number, start in enumerate(range(0, samples, PER_TAR)):
        with tarfile.open(raw / f"{number:05d}.tar", "w") as tar:
            for key in range(start, min(start + PER_TAR, samples)):
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
        "packs": {"pt": {"corpora": ["captions"], "template": "caption", "length": 2048, "epochs": 1}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _image(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (number >> 16 & 255, number >> 8 & 255, number & 255)).save(stream, "PNG")
    return stream.getvalue()
