"""The loader benchmark on a few small photos."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from benchmarks.loader import main, photo


def test_every_case_reads_the_same_photos(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--images", "4", "--pixels", "400", "300", "--side", "56", "--seq-len", "512", "--repeats", "1"])
    first, *table, last = capsys.readouterr().out.splitlines()
    assert first.startswith("4 photos of ") and sum(line.startswith("|") for line in table) == 2 + 5
    changed = float(last.split(" by ")[1].split(" of 255")[0])
    assert last.startswith("draft_jpeg changes a pixel by") and 0 < changed < 16


def test_a_drawn_photo_is_as_large_as_a_real_one() -> None:
    data = photo(0, 640, 480)
    assert Image.open(io.BytesIO(data)).size == (640, 480) and 50_000 < len(data) < 200_000
