"""Exports: atomic, exact, and readable by other tools."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.common.errors import UserError
from pipeline.model.export_files import FILES
from pipeline.model.weights import WeightSource
from pipeline.serving import export as export_module
from pipeline.serving.export import export
from pipeline.serving.export_config import ExportConfig
from pipeline.serving.model import load_model
from tests.launch import ROOT
from tests.pipeline.model.helpers import whole_stage
from tests.pipeline.serving.helpers import CONVERSATIONS, Saved, flat_layout, make_export, make_saved

SCORE = """
import sys, torch
from pipeline.serving.model import load_model
from tests.pipeline.serving.helpers import CONVERSATIONS
model = load_model(sys.argv[1])
torch.save([model.logits(model.prompt(turns)) for turns in CONVERSATIONS], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_process_computes_the_same_logits(dtype: str, tmp_path: Path) -> None:
    folder = export(make_saved(tmp_path, tie_word_embeddings=True), tmp_path / "export", dtype=dtype)
    model = load_model(folder)
    command = [sys.executable, "-c", SCORE, str(folder), str(tmp_path / "logits")]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    # CPUs may sum bf16 products in another order from one process to the next: two units in the last place.
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype == "float32" else {"rtol": 2.0**-7, "atol": 2.0**-7}
    for turns, logits in zip(CONVERSATIONS, theirs, strict=True):
        torch.testing.assert_close(model.logits(model.prompt(turns)), logits, **tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
def test_every_weight_survives_any_sharding(
    tied: bool, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", shard_bytes)
    saved = make_saved(tmp_path, tie_word_embeddings=tied)
    folder = export(saved, tmp_path / "export")
    spec = ExportConfig.load(folder).spec
    source = WeightSource.open_export(spec, folder)
    assert "lm_head.weight" in source
    loaded = whole_stage(spec, source=source)
    for name, param in saved.stage.named_parameters():
        assert torch.equal(loaded.get_parameter(name), param), name
    shards = sorted(folder.glob("model-*.safetensors"))
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert (len(shards) > 1) == (shard_bytes < 1 << 30)
    assert {path.stat().st_mode for path in shards} == {(folder / "config.json").stat().st_mode}


def test_exports_of_the_old_layout_are_read(tmp_path: Path) -> None:
    folder = make_export(tmp_path)
    model, old = load_model(folder), flat_layout(folder, tmp_path / "old")
    assert ExportConfig.load(old) == ExportConfig.load(folder)
    flat = load_model(old)
    assert all(torch.equal(flat.logits(flat.prompt(t)), model.logits(model.prompt(t))) for t in CONVERSATIONS)


def test_the_second_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    saved = make_saved(tmp_path, tie_word_embeddings=True)

    class Split(Saved):
        def parameters(self) -> Any:
            yield from super().parameters()
            yield "lm_head.weight", self.stage.lm_head.weight.detach()

    export(Split(saved.stage, saved.meta), tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    class Torn(Saved):
        def parameters(self) -> Any:
            yield from list(super().parameters())[:5]

    saved = make_saved(tmp_path)
    with pytest.raises(UserError, match=r"lacks .* parameters"):
        export(Torn(saved.stage, saved.meta), tmp_path / "export")
    assert not [path for path in tmp_path.iterdir() if "export" in path.name]


def meta_without(key: str) -> Callable[[Saved], Saved]:
    return lambda saved: replace(saved, meta={k: v for k, v in saved.meta.items() if k != key})


def meta_with(**changes: Any) -> Callable[[Saved], Saved]:
    return lambda saved: replace(saved, meta={**saved.meta, **changes})


def code_in_spec(saved: Saved) -> Saved:
    spec = saved.meta["spec"]
    evil = {**spec, "llm": {**spec["llm"], "_attn_implementation": "someone/kernel"}}
    return replace(saved, meta={**saved.meta, "spec": evil})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(meta_without("policy"), "incomplete .'policy'", id="no-policy"),
        pytest.param(meta_with(dtype="float8"), "cannot be saved as 'float8'", id="dtype"),
        pytest.param(meta_with(template={"name": "plan"}), "did you mean 'plain'", id="template"),
        pytest.param(meta_with(image_id="first"), "description is incomplete", id="image-id"),
        pytest.param(meta_with(eos_ids=[float("inf")]), "description is incomplete", id="eos"),
        pytest.param(code_in_spec, "the key '_attn_implementation' is refused", id="code"),
        pytest.param(meta_with(tokenizer="gone"), "not a tokenizer folder", id="tokenizer"),
    ],
)
def test_checkpoints_that_cannot_be_exported(change: Callable[[Saved], Saved], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        export(change(make_saved(tmp_path)), tmp_path / "export")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="exists: give a new folder"):
        export(make_saved(tmp_path), tmp_path / "export")


def become_foreign(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / FILES).unlink()


def lose_everything(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / FILES).unlink()


def spoil_version(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["mma"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    (folder / FILES).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lose_everything, "not an exported model", id="no-config"),
        pytest.param(become_foreign, "does not describe an export", id="foreign"),
        pytest.param(spoil_version, "version 99, this release reads version 4; export the run again", id="version"),
        pytest.param(lambda f: (f / "tokenizer" / "mma_tokenizer.json").unlink(), "is missing", id="tokenizer"),
        pytest.param(lambda f: next(f.glob("model-*")).unlink(), "is missing", id="weights"),
    ],
)
def test_damaged_exports_are_refused(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = make_export(tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=words):
        load_model(folder)
