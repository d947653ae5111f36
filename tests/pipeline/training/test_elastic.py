"""One run that goes on, step by step, on other numbers of ranks and stages: the same samples, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import open_checkpoint
from tests.pipeline.training.runs import furthest, metrics, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
GRIDS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (1, 1), (2, 2), (4, 1), (1, 2), (1, 1)]
"""Stages x dp ranks of each step: dp 1, 2, 3, 4; stages 1, 2, 1; then both at once, and back to one process."""
MODEL = ["--model.llm.config.num_hidden_layers", "4", "--train.steps", str(len(GRIDS))]


def test_a_run_goes_on_on_any_grid_as_if_undisturbed(small_demo: Path, tmp_path: Path) -> None:
    train(small_demo, tmp_path / "undisturbed", *MODEL, "--checkpoint.every-steps", "0").check()
    run_dir = tmp_path / "run"
    for step, (stages, dp) in enumerate(GRIDS, start=1):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "STOP").touch()  # there before the start: it ends after one step, saved
        grid = ["--parallel.pp", str(stages)]
        output = train(small_demo, run_dir, *MODEL, *grid, ranks=stages * dp).check().output
        assert f"at step {step}/{len(GRIDS)}" in output
        manifest = open_checkpoint(run_dir).manifest
        assert (manifest.step, manifest.pp, manifest.dp) == (step, stages, dp)
    ours, reference = metrics(run_dir), metrics(tmp_path / "undisturbed")
    for name in ("step", "samples", "consumed_packs", "targets", "tokens", "images", "lr"):
        assert [line[name] for line in ours] == [line[name] for line in reference], name
    assert len({line["samples"] for line in ours}) == len(GRIDS), "every step trains other samples"
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        expected = pytest.approx([line[name] for line in reference], rel=tolerance)
        assert [line[name] for line in ours] == expected, name
    assert furthest(weights(run_dir), weights(tmp_path / "undisturbed")) <= 1e-5
