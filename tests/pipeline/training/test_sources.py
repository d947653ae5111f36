"""Pretrained weights are read once: a run that goes on from a checkpoint reads nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.flags import parse
from pipeline.model.build import build_stage
from pipeline.model.spec import ModelSpec
from tests.pipeline.model.helpers import plain_llm
from tests.pipeline.training.runs import STEPS, flags, metrics, train, weights

pytestmark = pytest.mark.slow


def save_llm(demo: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Save the demo's language model, drawn with another seed, as a Hugging Face folder."""
    config = parse(flags(demo, folder)).config
    spec = ModelSpec.resolve(config.model, vocab_size=512, image_tokens=None)
    stage = build_stage(
        spec, layers=range(spec.layers), first=True, last=True, dtype=torch.float32, device="cpu", seed=77
    )
    model = plain_llm(stage)
    model.save_pretrained(folder)
    return dict(model.named_parameters())


def test_a_resumed_run_does_not_read_the_pretrained_weights_again(small_demo: Path, tmp_path: Path) -> None:
    saved = save_llm(small_demo, tmp_path / "llm")
    source = ["--model.llm.source", str(tmp_path / "llm"), "--train.lr", "1e-9", "--train.min-lr", "0"]
    train(small_demo, tmp_path / "run", *source, "--train.max-hours", "0.0000001").check()
    first = weights(tmp_path / "run")
    rows = len(saved["lm_head.weight"])
    assert torch.allclose(first["lm_head.weight"][:rows], saved["lm_head.weight"], atol=1e-6), "they were read at first"
    (tmp_path / "llm/model.safetensors").unlink()
    assert "resuming from" in train(small_demo, tmp_path / "run", *source).check().output
    assert len(metrics(tmp_path / "run")) == STEPS
