"""A small pack folder made of layout strings."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.common.files import write_atomic
from data_prep.packs import Manifest, PackReader, PackRow, Source, write_rows
from pipeline.masks import parse_layout

LAYOUTS = ("V3 Q2 A3", "Q2 A2 P4")


def pack_row(layout: str) -> PackRow:
    row = parse_layout(layout)
    columns = {name: getattr(row, name).numpy() for name in ("segment", "modality", "instance", "generated")}
    nothing, images = columns["segment"] * 0, int(columns["instance"].max()) + 1
    return PackRow(
        input_ids=nothing,
        image_row=nothing[:images].astype("int64"),
        n_target=1,
        source=(Source("demo", layout, 0),),
        **columns,
    )


@pytest.fixture
def packs(tmp_path: Path) -> PackReader:
    """Two rows of 8 tokens; the manifest says no more than readers of sidecars need."""
    entry = write_rows(tmp_path / "rows-00000.arrow", [pack_row(layout) for layout in LAYOUTS], 8)
    manifest = Manifest(
        seq_len=8, rows=len(LAYOUTS), targets=2, tokens=12, image_tokens=3, images=1, max_images=1,
        max_segment_tokens=8, vocab_size=8, pad_id=0, image_id=1, eos_ids=(2,), tokenizer="tokenizer",
        tokenizer_sha256="", template="plain", plan_sha256="", image_store="", files=(entry,),
    )  # fmt: skip
    write_atomic(tmp_path / "manifest.json", manifest.to_json().encode())
    return PackReader(tmp_path)
