"""The model section of a recipe: what it accepts, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import ConfigError, ConnectorConfig, ModelConfig
from pipeline.model.counts import ParamCounts
from pipeline.model.families.configs import vision_config
from pipeline.model.spec import ModelSpec
from tests.pipeline.model.helpers import (
    FAMILY_KEYS,
    IMAGE_TOKENS,
    SIDE,
    VISION_KEYS,
    VOCAB,
    model_config,
    tiny_spec,
    whole_stage,
)


def edited(**sections: dict[str, Any]) -> ModelConfig:
    """The tiny recipe with keys of llm.config, vision.config or connector replaced; None removes one."""
    raw = model_config().model_dump()
    for name, changes in sections.items():
        into = raw[name] if name == "connector" else raw[name]["config"]
        into.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del into[key]
    return ModelConfig.model_validate(raw)


def replaced(**connector: Any) -> ModelConfig:
    """The tiny recipe with another connector."""
    return ModelConfig.model_validate({**model_config().model_dump(), "connector": connector})


def folder(name: str, content: str | None) -> Callable[[Path], ModelConfig]:
    def make(path: Path) -> ModelConfig:
        if content is not None:
            (path / "config.json").write_text(content)
        raw = model_config().model_dump()
        raw[name] = {"source": str(path)}
        return ModelConfig.model_validate(raw)

    return make


CASES: dict[str, tuple[Callable[[Path], ModelConfig], str]] = {
    "no-type": (lambda _: edited(llm={"model_type": None}), "model.llm: no model_type: set model.llm.source"),
    "typo-type": (lambda _: edited(llm={"model_type": "lama"}), "did you mean 'llama'"),
    "foreign-type": (lambda _: edited(llm={"model_type": "t5"}), "'t5' is not supported.*known: gemma"),
    "typo-key": (lambda _: edited(llm={"hiden_size": 3}), "unknown key 'hiden_size' for llama.*'hidden_size'"),
    "wrong-type": (lambda _: edited(llm={"hidden_size": "wide"}), "model.llm: llama refuses its config: .*hidden_size"),
    "heads": (lambda _: edited(llm={"hidden_size": 33}), "multiple of the number of attention heads"),
    "no-vision-type": (lambda _: edited(vision={"model_type": None}), "model.vision: no model_type"),
    "vision-family": (lambda _: edited(vision={"model_type": "vit"}), "model.vision: model_type 'vit'"),
    "patch": (lambda _: edited(vision={"patch_size": 99}), "image_size 16 is smaller than patch_size 99"),
    "latents": (
        lambda _: edited(connector={"latents": 6}),
        "makes 6 tokens.*takes 5 tokens.*set model.connector.latents to 5",
    ),
    "patches": (
        lambda _: replaced(kind="mlp"),
        "kind=mlp makes 4 tokens of 2 x 2 patches.*takes 5 tokens.*kind=perceiver with model.connector.latents=5",
    ),
    "kind": (lambda _: replaced(kind="perciever"), "model.connector.kind 'perciever'.*did you mean 'perceiver'.*mlp"),
    "option": (lambda _: replaced(latens=5), "kind=perceiver has no option 'latens'.*did you mean 'latents'.*depth"),
    "foreign": (lambda _: replaced(kind="mlp", latents=5), "kind=mlp has no option 'latents'"),
    "type": (lambda _: replaced(latents="many"), "model: connector.latents: .*integer.*'many'"),
    "no-folder": (folder("llm", None), "holds no config.json: give a local"),
    "no-vision-folder": (folder("vision", None), "model.vision.source=.*holds no config.json"),
    "not-json": (folder("llm", "{"), "is not JSON"),
    "not-object": (folder("llm", "[]"), "is not a JSON object"),
    "foreign-folder": (folder("llm", '{"model_type": "bert"}'), "'bert' is not supported"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_key_and_the_fix(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    with pytest.raises(ConfigError, match=words):
        ModelSpec.resolve(make(tmp_path), vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)


@pytest.mark.parametrize(("needed", "rows"), [(VOCAB - 1, VOCAB), (VOCAB + 1, VOCAB + 1)])
def test_vocabulary_rows_cover_model_and_packs(needed: int, rows: int) -> None:
    spec = ModelSpec.resolve(model_config(), vocab_size=needed, image_tokens=IMAGE_TOKENS)
    assert spec.vocab_rows == rows


def test_dropout_is_off_and_no_token_is_left_untrained() -> None:
    spec = tiny_spec("phi3", attention_dropout=0.1, resid_pdrop=0.2, pad_token_id=1)
    assert (spec.llm.attention_dropout, spec.llm.resid_pdrop, spec.llm.pad_token_id) == (0.0, 0.0, None)
    assert vision_config(edited(vision={"attention_dropout": 0.1}).vision).attention_dropout == 0.0


@pytest.mark.parametrize("family", FAMILY_KEYS)
@pytest.mark.parametrize("vision", VISION_KEYS)
def test_a_spec_survives_json(family: str, vision: str) -> None:
    spec = tiny_spec(family, vision=vision)
    raw = json.loads(json.dumps(spec.to_dict()))
    again = ModelSpec.from_dict(raw)
    assert again.to_dict() == spec.to_dict()
    assert type(again.llm) is type(spec.llm)


def test_a_model_saved_when_all_connectors_shared_their_options_is_read() -> None:
    config = model_config().model_copy(update={"connector": ConnectorConfig(kind="mlp")})
    spec = ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=4)
    shared = {"kind": "mlp", "latents": 144, "depth": 6, "heads": 8, "head_dim": 64, "ff_mult": 4}
    assert ModelSpec.from_dict({**spec.to_dict(), "connector": shared}) == ModelSpec.from_dict(spec.to_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"vision": None}, "description is damaged", id="no-vision"),
        pytest.param({"llm": {"model_type": "t5"}}, "'t5' is not supported", id="family"),
        pytest.param({"image_tokens": "many"}, "description is damaged", id="image-tokens"),
        pytest.param({"connector": {"kind": "conv"}}, "kind 'conv' is not known.*known: perceiver", id="connector"),
        pytest.param({"connector": ["mlp"]}, "description is damaged", id="connector-list"),
        pytest.param({"connector": {"kind": ["mlp"]}}, "description is damaged", id="connector-kind"),
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelSpec.from_dict({**tiny_spec().to_dict(), **change})


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "over", "limit"),
    [
        pytest.param("llama", {}, 256, id="positions"),
        pytest.param(
            "phi3",
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
            64,
            id="longrope-short-regime",
        ),
    ],
)
def test_samples_longer_than_the_positions_are_refused(family: str, over: dict[str, Any], limit: int) -> None:
    spec = tiny_spec(family, **over)
    spec.check_segments(limit)
    with pytest.raises(ConfigError, match=f"sample of {limit + 1} tokens.*{limit}"):
        spec.check_segments(limit + 1)


def test_preprocessing_is_read_from_the_towers_folder(tmp_path: Path) -> None:
    config = model_config(vision="clip_vision_model")
    (tmp_path / "config.json").write_text(json.dumps(config.vision.config))
    said = ModelConfig.model_validate({**config.model_dump(), "vision": {"source": str(tmp_path)}})
    spec = ModelSpec.resolve(said, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert spec.preprocess.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    spec = ModelSpec.resolve(said, vocab_size=VOCAB, image_tokens=IMAGE_TOKENS)
    assert (spec.preprocess.size_px, spec.preprocess.mean) == (SIDE, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vision", VISION_KEYS)
def test_counts_are_those_of_the_built_model(vision: str, tied: bool) -> None:
    spec = tiny_spec(vision=vision, tie_word_embeddings=tied)
    built = sum(param.numel() for param in whole_stage(spec).parameters())
    assert ParamCounts.of(spec).total == built
