"""A head tied to the embedding trains the same on one stage and on two, and moves between them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipeline.training.runs import furthest, metrics, train, weights

pytestmark = pytest.mark.slow
TIED = ["--model.llm.config.tie_word_embeddings", "true"]
TWO_STAGES = [*TIED, "--parallel.pp", "2"]


@pytest.fixture(scope="module")
def one_stage(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tied") / "run"
    train(small_demo, run_dir, *TIED, ranks=1).check()
    return run_dir


@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "from a checkpoint of one stage"])
def test_two_stages_train_the_shared_weight_as_one(
    resumed: bool, one_stage: Path, small_demo: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    if resumed:
        shutil.copytree(one_stage, run_dir)
        shutil.rmtree(run_dir / "checkpoints/step-00000006")
    train(small_demo, run_dir, *TWO_STAGES).check()
    losses, wanted = ([line["loss"] for line in metrics(folder)] for folder in (run_dir, one_stage))
    assert losses == pytest.approx(wanted, rel=1e-5)
    mine, theirs = weights(run_dir), weights(one_stage)
    head = mine.pop("lm_head.weight")
    assert (head - mine["model.embed_tokens.weight"]).abs().max() <= 1e-6
    assert furthest(mine, theirs) <= 1e-4
