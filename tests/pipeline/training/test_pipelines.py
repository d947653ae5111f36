"""A run that goes from an interleaved pipeline to one process and back equals one that never left one process."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main as mma
from pipeline.commands.demo import same_answers
from tests.pipeline.training.runs import furthest, metrics, train, weights

pytestmark = pytest.mark.slow
STEPS, TRACED = 4, 3
DEEP = ["--model.llm.config.num_hidden_layers", "4", "--train.global-batch-size", "4", "--train.steps", str(STEPS)]
INTERLEAVED = ["--parallel.pp", "2", "--parallel.schedule", "interleaved", "--parallel.virtual-stages", "2"]


@pytest.fixture(scope="module")
def plain(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(small_demo, run_dir, *DEEP, ranks=1).check()
    return run_dir


@pytest.fixture(scope="module")
def wandering(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step on two interleaved stages, one on one process, the rest on two stages again."""
    run_dir = tmp_path_factory.mktemp("wandering") / "run"
    run_dir.mkdir()
    for ranks, more in ((2, INTERLEAVED), (1, [])):
        (run_dir / "STOP").touch()
        train(small_demo, run_dir, *DEEP, *more, ranks=ranks).check()
    assert len(metrics(run_dir)) == 2
    log = ["--log.trace-step", str(TRACED), "--log.traffic", "true"]
    output = train(small_demo, run_dir, *DEEP, *INTERLEAVED, *log).check().output
    assert "interleaved, expected bubble" in output and "stage 0: layers 0..0, 2..2" in output
    assert f"trace of step {TRACED}:" in output
    return run_dir


def test_the_result_is_that_of_one_process(plain: Path, wandering: Path) -> None:
    for ours, reference in zip(metrics(wandering), metrics(plain), strict=True):
        assert ours["targets"] == reference["targets"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert furthest(weights(wandering), weights(plain)) <= 1e-5


def test_bubbles_are_measured_where_they_are_asked_for(plain: Path, wandering: Path) -> None:
    bubbles = [line["bubble"] for line in metrics(wandering)]
    assert bubbles[:2] == [None, None] and all(0 < bubble < 1 for bubble in bubbles[2:])
    assert len(bubbles) == STEPS
    assert {line["bubble"] for line in metrics(plain)} == {line["expected_bubble"] for line in metrics(plain)} == {None}
    assert all(0 < line["expected_bubble"] < 0.5 for line in metrics(wandering)[2:])


def test_the_trace_shows_the_traced_step(wandering: Path) -> None:
    assert [path.name for path in wandering.glob("trace-*")] == [f"trace-step-{TRACED}.json"]
    events = json.loads((wandering / f"trace-step-{TRACED}.json").read_text())["traceEvents"]
    for rank in (0, 1):
        kinds = Counter(event["cat"] for event in events if event["ph"] == "X" and event["pid"] == rank)
        assert kinds == {"forward": 8, "backward": 8, "wait": 12, "optimizer": 1, "data": 1}


def test_both_models_give_the_same_answers(small_demo: Path, plain: Path, wandering: Path, tmp_path: Path) -> None:
    models = [tmp_path / "plain", tmp_path / "wandering"]
    for run_dir, model in zip((plain, wandering), models, strict=True):
        assert mma(["export", str(run_dir), str(model)]) == 0
        assert mma(["evaluate", "--model", str(model), "--packs", str(small_demo / "packs/eval"), "--limit", "24"]) == 0
    answers: list[Any] = [
        json.loads((model / "evaluation.json").read_text())[str(model)]["answers"] for model in models
    ]
    assert answers[0] == answers[1]
    assert same_answers(models[1], models[0]).endswith("24 of 24 (100.0%)")
    assert "does not exist, so there is nothing to compare" in same_answers(models[1], tmp_path / "nowhere")
