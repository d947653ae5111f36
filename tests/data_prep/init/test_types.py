"""``mma-prep types``: what it lists is what the readers take."""

from __future__ import annotations

import pytest

from data_prep.cli import main
from data_prep.corpora import CORPORA
from data_prep.init.types import common_options, options_of


def test_every_type_is_listed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["types"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == sorted(CORPORA)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


@pytest.mark.parametrize("name", CORPORA)
def test_every_option_has_its_type_default_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["types", name]) == 0
    said = capsys.readouterr().out
    options = options_of(name)
    assert {option.name.split(".")[0] for option in options} == CORPORA[name].model_fields.keys() - {"root"}
    for option in [*options, *common_options()]:
        assert option.kind and option.default and len(option.help) > 15, option
        assert f"  {option.name}: {option.kind}" in said
        assert "typing" not in option.kind and "Undefined" not in option.default, option


def test_an_unknown_type_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["types", "lava"]) == 2
    assert "unknown corpus type 'lava' (did you mean 'llava'?); known: aokvqa" in capsys.readouterr().err
