"""What the README names exists; what it tells to type is understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.corpora import CORPORA
from data_prep.recipe import shipped_recipes
from pipeline.config.flags import build_parser
from pipeline.config.recipes import RECIPES
from pipeline.parallel.ds_config import read_ds_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^):]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_training_recipe_is_listed_and_shipped() -> None:
    shipped = {path.stem for path in RECIPES.glob("*.yaml")} - {"demo_base"}
    assert shipped == set(re.findall(r"`((?:demo|aki_4b|llama32_3b|nlvr|cc12m)_(?:pt|sft))`", README))
    assert {"demo", "nlvr", "cc12m", "aki_pt", "aki_sft"} <= set(shipped_recipes())


def test_every_corpus_type_is_listed() -> None:
    table = README[README.index("| `type` | reads |") : README.index("**2. Training.**")]
    assert set(CORPORA) == {
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1:2][0] if "|" in row else "")
    }


def test_training_flags_are_known() -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    for command in (line for line in COMMANDS if line.startswith("deepspeed ")):
        words = command.split("#")[0].split("pipeline/train.py")[1].split()
        assert {word for word in words if word.startswith("--")} <= known, command


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda path: path.name)
def test_shipped_deepspeed_files_are_accepted(path: Path) -> None:
    assert read_ds_config(str(path))["zero_optimization"]["stage"] in (1, 2, 3)
