"""The shipped recipes on real files; set NLVR_DIR and CC12M_DIR to the folders of the raw data to run these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.packs import PackReader


@pytest.mark.parametrize(
    ("recipe", "variable", "sets"),
    [("nlvr", "NLVR_DIR", {"pt", "sft", "eval"}), ("cc12m", "CC12M_DIR", {"pt"})],
)
@pytest.mark.slow
def test_a_shipped_recipe_packs_its_real_data(tmp_path: Path, recipe: str, variable: str, sets: set[str]) -> None:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: set it to the folder of recipe {recipe}'s raw data")
    assert main(["run", recipe, "--out", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "packs").iterdir()} == sets
    for name in sets:
        reader = PackReader(tmp_path / "packs" / name)
        assert reader.manifest.targets == sum(row.n_target for row in reader) > 0
        assert reader.manifest.tokens / (len(reader) * reader.manifest.seq_len) > 0.7
