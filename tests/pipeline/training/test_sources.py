"""Pretrained weights are read once: a run that goes on from a checkpoint reads nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.common.events import EVENTS_FILE, EventLedger
from pipeline.config.flags import parse
from pipeline.model.build import build_stage
from pipeline.model.spec import ModelSpec
from tests.pipeline.model.helpers import plain_llm
from tests.pipeline.training.runs import STEPS, flags, metrics, train, weights

pytestmark = pytest.mark.slow


def save_llm(demo: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Save the demo's language model, drawn with another seed, as a Hugging Face folder."""
    config = parse(flags(demo, folder)).config
    spec = ModelSpec.resolve(config.model, vocab_size=500, image_tokens=None)
    stage = build_stage(
        spec, layers=range(spec.layers), first=True, last=True, dtype=torch.float32, device="cpu", seed=77
    )
    model = plain_llm(stage)
    model.save_pretrained(folder)
    return dict(model.named_parameters())


def add_what_is_not_read(folder: Path) -> None:
    """A buffer of older releases, and a key that would run code."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.rotary_emb.inv_freq": torch.ones(4)}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "theirs.Model"}}))


def test_a_resumed_run_does_not_read_the_pretrained_weights_again(small_demo: Path, tmp_path: Path) -> None:
    saved = save_llm(small_demo, tmp_path / "llm")
    add_what_is_not_read(tmp_path / "llm")
    source = ["--model.llm.source", str(tmp_path / "llm"), "--train.lr", "1e-9", "--train.min-lr", "0"]
    train(small_demo, tmp_path / "run", *source, "--train.max-hours", "0.0000001").check()
    first = weights(tmp_path / "run")
    rows = len(saved["lm_head.weight"])
    assert torch.allclose(first["lm_head.weight"][:rows], saved["lm_head.weight"], atol=1e-6), "they were read at first"
    assert EventLedger(tmp_path / "run" / EVENTS_FILE).summary().items() >= {
        ("weights-unused", 1),
        ("config-key-ignored", 1),
        ("vocabulary-extended", len(first["lm_head.weight"]) - rows),
    }
    (tmp_path / "llm/model.safetensors").unlink()
    assert "resuming from" in train(small_demo, tmp_path / "run", *source).check().output
    assert len(metrics(tmp_path / "run")) == STEPS
