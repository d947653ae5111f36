"""A small pack folder made of layout strings."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from data_prep.common.files import write_atomic
from data_prep.packs import Manifest, PackReader, PackRow, Source, write_rows
from pipeline.masks import parse_layout

LAYOUTS = ("V3 Q2 A3", "Q2 A2 P4")


def pack_row(layout: str) -> PackRow:
    row = parse_layout(layout)
    columns = {name: getattr(row, name).numpy() for name in ("segment", "modality", "instance", "generated")}
    nothing = columns["segment"] * 0
    return PackRow(input_ids=nothing, image_row=nothing[:0], n_target=1, source=(Source("demo", layout, 0),), **columns)


@pytest.fixture
def packs(tmp_path: Path) -> PackReader:
    """Two rows of 8 tokens; the manifest says no more than readers of sidecars need."""
    entry = write_rows(tmp_path / "rows-00000.arrow", [pack_row(layout) for layout in LAYOUTS], 8)
    blanks = {"int": 1, "str": "", "tuple[int, ...]": ()}
    required = {f.name: blanks[str(f.type)] for f in fields(Manifest) if f.default is f.default_factory is MISSING}
    manifest = Manifest(**(required | {"seq_len": 8, "rows": len(LAYOUTS), "files": (entry,)}))
    write_atomic(tmp_path / "manifest.json", manifest.to_json().encode())
    return PackReader(tmp_path)
