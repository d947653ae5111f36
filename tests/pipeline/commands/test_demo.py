"""The demo's runs: their names, and that the trainer accepts their flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from pipeline.cli import main
from pipeline.commands.demo import same_answers, stages_of
from pipeline.config.flags import parse


@pytest.mark.parametrize(("pp", "end"), [(1, ""), (2, "_pp2")])
def test_each_number_of_stages_has_its_own_runs(pp: int, end: str) -> None:
    stages = stages_of(pp, "causal")
    assert [stage.run for stage in stages] == [f"demo_pt{end}", f"demo_sft{end}", f"demo_sft_causal{end}"]
    for stage in stages:
        config = parse(["--recipe", stage.recipe, *stage.flags]).config
        assert config.parallel.pp == pp
        assert config.parallel.micro_batches == parse(["--recipe", stage.recipe]).config.parallel.micro_batches
        assert config.init_from == ("" if stage is stages[0] else str(stages[0].folder))
    assert config.mask.policy == "causal"
    assert stages_of(pp) == stages[:2]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="casual"):
        stages_of(1, "casual")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pp 3 --ranks 4", "--pp 3 does not divide --ranks 4"),
        ("--pp 4 --ranks 4", "= 4 is more than the model's 2"),
        ("--pp 0", "argument --pp: '0' is not a whole number above 0"),
        ("--ranks -2", "argument --ranks: '-2' is not a whole number above 0"),
        ("--ranks 100000", "start fewer ranks"),
    ],
)
def test_ranks_that_stages_do_not_divide_are_refused_before_any_work(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.commands.demo._call", lambda command, what: pytest.fail(f"{what} was started"))
    assert main(["demo", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_answers_are_compared_question_by_question(tmp_path: Path) -> None:
    def evaluated(name: str, *answers: str) -> Path:
        (tmp_path / name).mkdir()
        asked = [{"sample": f"q{number}", "answer": answer} for number, answer in enumerate(answers)]
        content = json.dumps({str(tmp_path / name): {"answers": asked}})
        (tmp_path / name / "evaluation.json").write_text(content)
        return tmp_path / name

    ours = evaluated("ours", "red", "two", "yes", "no")
    assert same_answers(ours, evaluated("theirs", "red", "two", "no", "no")).endswith("theirs: 3 of 4 (75.0%)")
    assert "different questions" in same_answers(ours, evaluated("fewer", "red"))
    assert "does not exist" in same_answers(ours, tmp_path / "nowhere")
