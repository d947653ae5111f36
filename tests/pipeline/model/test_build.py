"""Building a stage: the same bits for every split, and exactly the weights of a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SiglipConfig, SiglipModel

from data_prep.common.errors import UserError
from pipeline.config.schema import ModelConfig
from pipeline.model.build import build_stage
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource, global_shapes
from tests.pipeline.model.helpers import (
    FAMILY_KEYS,
    IMAGE_TOKENS,
    VISION,
    VISION_KEYS,
    VOCAB,
    model_config,
    plain_llm,
    tiny_spec,
    whole_stage,
)


def parts(spec: ModelSpec, *cuts: int, seed: int = 3, **options: Any) -> list[Stage]:
    edges = [0, *cuts, spec.layers]
    options = {"dtype": torch.float32, "device": "cpu", **options}
    return [
        build_stage(spec, layers=range(lo, hi), first=lo == 0, last=hi == spec.layers, seed=seed, **options)
        for lo, hi in pairwise(edges)
    ]


def weights(*stages: Stage) -> dict[str, torch.Tensor]:
    return {name: param for stage in stages for name, param in stage.named_parameters()}


@pytest.mark.parametrize("vision", VISION_KEYS)
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_any_split_has_the_same_bits(cuts: tuple[int, ...], vision: str) -> None:
    spec = tiny_spec(vision=vision)
    whole, split = weights(*parts(spec)), weights(*parts(spec, *cuts))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_a_tied_head_on_another_stage_starts_as_the_embedding() -> None:
    spec = tiny_spec(tie_word_embeddings=True)
    first, last = parts(spec, 1)
    assert torch.equal(first.model.embed_tokens.weight, last.lm_head.weight)
    one = whole_stage(spec)
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert "lm_head.weight" not in weights(one)


def test_initial_values_depend_only_on_seed_and_unit() -> None:
    spec = tiny_spec()
    before = torch.random.get_rng_state()
    one, other = weights(*parts(spec)), weights(*parts(spec, seed=4))
    assert torch.equal(before, torch.random.get_rng_state())
    matrices = [name for name, value in one.items() if value.dim() > 1]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    query = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(one[query.format(0)], one[query.format(1)])


@pytest.mark.parametrize("family", FAMILY_KEYS)
def test_initialisation_equals_the_familys_own(family: str) -> None:
    stage = whole_stage(tiny_spec(family))
    model = plain_llm(stage)  # its state is the stage's; its initialiser is the family's
    torch.manual_seed(1)
    model.apply(model._init_weights)
    mine = weights(stage)
    for name, theirs in model.named_parameters():
        if theirs.dim() == 1:  # norms and biases are constants
            assert torch.equal(mine[name], theirs), name
        else:
            assert abs(mine[name].std() / theirs.std() - 1) < 0.25, name


def test_units_cover_every_parameter_once_and_are_whole_when_sharded() -> None:
    seen: list[int] = []

    def shard(unit: nn.Module) -> None:
        assert all(param.device.type == "cpu" for param in unit.parameters())
        seen.extend(id(param) for param in unit.parameters())

    (stage,) = parts(tiny_spec(), shard=shard)
    assert sorted(seen) == sorted(id(param) for param in stage.parameters())
    assert not [name for name, buffer in stage.named_buffers() if buffer.is_meta]


def test_one_unit_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stage] = []

    class Recorded(Stage):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    def shard(unit: nn.Module) -> None:
        whole = {id(param) for param in made[0].parameters() if param.numel() and not param.is_meta}
        assert whole == {id(param) for param in unit.parameters()}
        for param in unit.parameters():
            param.data = torch.empty(0)  # as ZeRO-3 leaves it

    monkeypatch.setattr("pipeline.model.build.Stage", Recorded)
    parts(tiny_spec(), shard=shard)


def test_a_rank_that_does_not_read_holds_zeros() -> None:
    (stage,) = parts(tiny_spec(), reads=False)
    assert not any(param.any() for param in stage.parameters())


def test_half_precision_is_the_rounded_fp32_model() -> None:
    exact, rounded = whole_stage(tiny_spec()), whole_stage(tiny_spec(), dtype=torch.bfloat16)
    for name, param in rounded.named_parameters():
        assert torch.equal(param, exact.get_parameter(name).bfloat16())


# ---- pretrained folders


def save_llm(folder: Path, family: str = "llama", *, shard: str = "20KB", **llm: Any) -> dict[str, torch.Tensor]:
    """Save a tiny language model as the library saves it; return its weights."""
    model = plain_llm(whole_stage(tiny_spec(family, **llm)))
    model.config.vocab_size = model.get_input_embeddings().weight.shape[0]
    model.save_pretrained(folder, max_shard_size=shard)
    return dict(model.named_parameters())


def save_tower(folder: Path, *, whole: bool) -> dict[str, torch.Tensor]:
    """Save a SigLIP tower, by itself or within the two-tower model; return its weights by the tower's names."""
    torch.manual_seed(5)
    text = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(VISION)))
    (model if whole else model.vision_model).save_pretrained(folder)
    return dict(model.vision_model.named_parameters())


def source_config(llm: Path | str = "", vision: Path | str = "", **over: Any) -> ModelConfig:
    raw = model_config().model_dump()
    if llm:
        raw["llm"] = {"source": str(llm), "config": over}
    if vision:
        raw["vision"] = {"source": str(vision)}
    return ModelConfig.model_validate(raw)


def resolve(config: ModelConfig, vocab: int = VOCAB) -> ModelSpec:
    return ModelSpec.resolve(config, vocab_size=vocab, image_tokens=IMAGE_TOKENS)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_loading_a_saved_folder_is_exact(family: str, shard: str, tmp_path: Path) -> None:
    saved = save_llm(tmp_path, family, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "20KB")
    spec = resolve(source_config(tmp_path))
    loaded = weights(*parts(spec, 1, source=WeightSource.open(spec)))
    loaded.pop("lm_head.weight", None) if spec.tied else None
    assert {name for name in loaded if not name.startswith(("vision.", "connector."))} == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    scratch = weights(whole_stage(spec))
    assert torch.equal(loaded["connector.latents"], scratch["connector.latents"])


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "two-towers"])
def test_loading_a_tower_is_exact(whole: bool, tmp_path: Path) -> None:
    saved = save_tower(tmp_path, whole=whole)
    spec = resolve(source_config(vision=tmp_path))
    stage = whole_stage(spec, source=WeightSource.open(spec))
    for name, param in stage.vision.named_parameters():
        assert torch.equal(param, saved[name]), name


def test_a_tower_can_be_loaded_with_fewer_layers(tmp_path: Path) -> None:
    save_tower(tmp_path, whole=False)
    config = source_config(vision=tmp_path)
    config = config.model_copy(update={"vision": config.vision.model_copy(update={"config": {"num_hidden_layers": 1}})})
    spec = resolve(config)
    assert len(whole_stage(spec, source=WeightSource.open(spec)).vision.encoder.layers) == 1


def test_new_vocabulary_rows_are_the_mean_of_the_old(tmp_path: Path) -> None:
    saved = save_llm(tmp_path)
    spec = resolve(source_config(tmp_path), vocab=VOCAB + 3)
    stage = whole_stage(spec, source=WeightSource.open(spec))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = stage.get_parameter(name)
        assert torch.equal(rows[:VOCAB], saved[name])
        assert torch.allclose(rows[VOCAB:], saved[name].mean(dim=0).expand(3, -1), atol=1e-7)


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def escape(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mislead(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks 1 tensors .model.norm.weight"),
    "unexpected": (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(1))), "does not, 1 tensors .extra"),
    "shape": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"has shape \[3\], .*\[32\]",
    ),
    "scalar": (lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.ones(())})), r"has shape \[\]"),
    "quantized": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "stored as I8: only F32",
    ),
    "pickled": (to_pickle, "only pickled weights"),
    "empty": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "torn": (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "cannot be read"),
    "outside": (escape, "not a file of the folder"),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is damaged"),
    "deep-index": (lambda f: (f / "model.safetensors.index.json").write_text("[" * 10**6), "is damaged"),
    "wrong-file": (mislead, "does not hold model.norm.weight, as"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mismatched_folders_are_refused(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    save_llm(folder, shard="1GB")
    spec = resolve(source_config(folder))
    break_it, words = FAULTS[fault]
    break_it(folder)
    with pytest.raises(UserError, match=words):
        WeightSource.open(spec)


def test_without_folders_there_is_no_source() -> None:
    assert WeightSource.open(tiny_spec()) is None


def test_global_shapes_are_those_of_the_built_model() -> None:
    spec = replace(tiny_spec(tie_word_embeddings=True))
    assert dict(global_shapes(spec)) == {name: tuple(value.shape) for name, value in weights(whole_stage(spec)).items()}
