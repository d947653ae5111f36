"""Frozen bytes stay, whatever the pattern and the grid; stages that train nothing; learning rates by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import ROOT, run
from tests.pipeline.parallel.grid_worker import grid_spec
from tests.pipeline.training.freeze_worker import CASES, CONNECTOR_ONLY, LAYERS, RANKS, STEPS, Case
from tests.pipeline.training.runs import metrics, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("freeze")
    worker, env = ROOT / "tests/pipeline/training/freeze_worker.py", {"PYTHONPATH": str(ROOT)}
    run(RANKS, worker, str(out), env=env, launcher="srun", timeout_s=550).check()
    return out


def ranks_of(results: Path, case: Case) -> list[dict[str, Any]]:
    return [torch.load(results / f"{case}-{rank}.pt") for rank in range(RANKS)]


def whole(ranks: list[dict[str, Any]], case: Case, when: str) -> dict[str, torch.Tensor]:
    """All parameters, flat and without padding."""
    if case.pp == RANKS:
        return {name: shard for rank in ranks for name, shard in rank[when].items()}
    return {name: torch.cat([rank[when][name] for rank in ranks]) for name in ranks[0][when]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_bytes_are_unchanged_and_stages_change_nothing(case: Case, results: Path) -> None:
    """A model in two stages, some of which may train nothing, equals the model in one."""
    trainable, _ = case.rule()
    ranks, single = ranks_of(results, case), ranks_of(results, case.whole)
    for rank in (*ranks, *single):
        for name, before in rank["before"].items():
            same = torch.equal(before.view(torch.int32), rank["after"][name].view(torch.int32))
            assert trainable.trains(name) == (name in rank["trained"])
            assert same != trainable.trains(name) or not before.numel(), name
        trained = sum(rank["before"][name].numel() for name in rank["trained"])
        assert 2 * trained <= rank["states"] <= 2 * trained + 8, "two moments of what is trained, and none of the rest"
        assert rank["steps"] == STEPS
    for key in ("loss", "norm"):
        assert ranks[0][key] == pytest.approx(single[0][key], rel=1e-4)
    ours, theirs = whole(ranks, case, "after"), whole(single, case.whole, "after")
    for name, values in theirs.items():
        assert torch.allclose(ours[name], values[: ours[name].numel()], atol=1e-5, rtol=0), name


def test_only_what_is_trained_is_reduced(results: Path) -> None:
    spec = grid_spec(False, LAYERS)
    connector = sum(param.numel() for param in spec.meta_connector().parameters())
    reduced = ranks_of(results, CONNECTOR_ONLY.whole)[0]["reduced"]
    assert all(4 * connector <= each <= 4 * 1.02 * connector for each in reduced)
    assert ranks_of(results, CONNECTOR_ONLY)[1]["trained"] == set(), "the second stage trains nothing"


def test_a_run_records_the_rate_of_each_part_and_resumes_with_what_it_trained(small_demo: Path, tmp_path: Path) -> None:
    frozen = ["--train.freeze", "model.layers.0", "--train.lr-of", "connector=1e-2,model.embed_tokens=1e-4"]
    train(small_demo, tmp_path, *frozen, "--train.steps", "2", "--train.schedule", "constant", ranks=1).check()
    assert [line["lr_of"] for line in metrics(tmp_path)] == [
        pytest.approx({"connector": rate * 1e-2, "model.embed_tokens": rate * 1e-4, "llm": rate * 1.5e-3})
        for rate in (0.5, 1.0)
    ]
    other = train(small_demo, tmp_path, "--train.steps", "2", "--train.schedule", "constant", ranks=1)
    assert other.code == 2
    assert "train.freeze: ['model.layers.0'] -> []" in other.output and "train.lr_of: {" in other.output
