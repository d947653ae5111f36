"""``mma mask`` and ``mma prove`` on layouts and pack folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.commands.masks import mask_command, prove_command
from pipeline.masks import POLICIES

Command = Callable[[Sequence[str]], int]


def test_masks_of_a_layout_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert mask_command(["V4 Q2 A2"]) == 0
    shown = capsys.readouterr().out
    assert "causal:" in shown and "mma:" in shown and "VVVVQQAA" in shown


def test_masks_of_a_pack_row_are_drawn(packs: PackReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mask.png"
    assert mask_command([str(packs.directory), "--row", "1", "--policy", "mma", "--out", str(target)]) == 0
    assert target.stat().st_size > 1000
    assert capsys.readouterr().out == f"{target}: mma on 8 tokens\n"


def test_proofs_are_tabulated_and_set_the_exit_code(packs: PackReader, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove_command([str(packs.directory), "--rows", "2", "--layers", "4"]) == 0
    assert capsys.readouterr().out.count("yes") == 2
    assert prove_command(["V2 Q1 A2", "--policy", "mma", "--policy", "image_to_answer"]) == 1
    assert "no" in capsys.readouterr().out


@pytest.mark.parametrize("command", [mask_command, prove_command])
def test_help_teaches_policies_and_layouts(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert all(name in shown for name in POLICIES)
    assert "V64 Q12 A8 Q9 A5" in shown and "examples:" in shown


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        pytest.param(mask_command, ["V4 X2"], "cannot read 'X2'", id="layout"),
        pytest.param(mask_command, ["no/such/folder"], "no such pack folder", id="folder"),
        pytest.param(mask_command, ["{packs}", "--row", "9"], r"has rows 0\.\.1, not 9", id="row"),
        pytest.param(mask_command, ["V4", "--out", "mask.jpg"], r"ends in \.png", id="format"),
        pytest.param(mask_command, ["V4 Q1", "--policy", "mna"], "did you mean 'mma'", id="policy"),
        pytest.param(mask_command, ["V4", "--policy", "cca"], "place in the image.*--grid", id="no-grid"),
        pytest.param(mask_command, ["V4", "--policy", "cca", "--grid", "2by2"], "such as 27x27", id="grid"),
        pytest.param(prove_command, ["{packs}", "--rows", "3"], r"has rows 0\.\.1, not 2", id="rows"),
        pytest.param(prove_command, ["V4", "--rows", "0"], "at least one row", id="no-rows"),
        pytest.param(prove_command, ["V4", "--layers", "0"], "at least one layer", id="no-layers"),
        pytest.param(prove_command, ["V4 Q2 A2", "--policy", "mma+0:4=mixde"], "did you mean 'mixed'", id="layer"),
    ],
)
def test_user_errors_are_one_line(command: Command, arguments: list[str], message: str, packs: PackReader) -> None:
    with pytest.raises(UserError, match=message):
        command([argument.format(packs=packs.directory) for argument in arguments])
