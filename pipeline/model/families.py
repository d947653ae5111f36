"""Hugging Face configs of the language model and the vision tower, checked before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from data_prep.common.errors import did_you_mean
from pipeline.config.schema import ConfigError, LlmConfig, VisionConfig

LLM_FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Decoder families whose layers, rotary embedding and head are called exactly as in transformers."""
VISION_FAMILIES = ("clip_vision_model", "siglip_vision_model")
_COMPOSITE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


def llm_config(config: LlmConfig, *, vocab_size: int) -> PreTrainedConfig:
    """Return the decoder's config with at least ``vocab_size`` embedding rows and no dropout.

    Raises ConfigError naming the key for a missing folder, an unsupported family, or a value it refuses.
    """
    raw = _merged("model.llm", config.source, config.config)
    family = _family("model.llm", raw, LLM_FAMILIES)
    raw["vocab_size"] = max(int(raw.get("vocab_size", 0)), vocab_size)
    # Special tokens belong to the tokenizer. If set here, the padding row would never be trained, and Phi-3's padding
    # is also its end-of-text token.
    raw |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return _without_dropout(_make("model.llm", family, raw, config.config))


def vision_config(config: VisionConfig) -> PreTrainedConfig:
    """Return the tower's config without dropout and without the pooling head, which no connector uses.

    Raises ConfigError as :func:`llm_config` does, and for an image size smaller than a patch.
    """
    raw = _merged("model.vision", config.source, config.config)
    if raw.get("model_type") in _COMPOSITE:
        raw = {"model_type": _COMPOSITE[raw["model_type"]], **raw.get("vision_config", {}), **config.config}
        raw["model_type"] = _COMPOSITE.get(raw["model_type"], raw["model_type"])
    family = _family("model.vision", raw, VISION_FAMILIES)
    if family == "siglip_vision_model":
        raw["vision_use_head"] = False
    made = _without_dropout(_make("model.vision", family, raw, config.config))
    if not isinstance(made.image_size, int) or not isinstance(made.patch_size, int):
        raise ConfigError("model.vision.config: image_size and patch_size must be whole numbers (square images)")
    if made.image_size < made.patch_size:
        raise ConfigError(
            f"model.vision.config: image_size {made.image_size} is smaller than patch_size {made.patch_size}"
        )
    return made


def config_from_dict(raw: Mapping[str, Any], known: tuple[str, ...]) -> PreTrainedConfig:
    """Rebuild a config saved in a checkpoint or an export. Raises ConfigError as :func:`llm_config` does."""
    return _make("saved model", _family("saved model", raw, known), raw, {})


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set dropout to 0: no step is random, so a resumed run equals an uninterrupted one."""
    for key in _DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config


def _merged(key: str, source: str, overlay: Mapping[str, Any]) -> dict[str, Any]:
    if not source:
        return dict(overlay)
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{key}.source={source} holds no config.json: give a local Hugging Face folder (nothing is downloaded)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy the model's folder again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object: copy the model's folder again")
    return {**raw, **overlay}


def _family(key: str, raw: Mapping[str, Any], known: tuple[str, ...]) -> str:
    family = raw.get("model_type")
    if family is None:
        raise ConfigError(f"{key}: no model_type: set {key}.source to a local folder, or {key}.config.model_type")
    if family not in known:
        guess = did_you_mean(str(family), known)
        raise ConfigError(f"{key}: model_type '{family}' is not supported{guess}; known: {', '.join(known)}")
    return str(family)


def _make(key: str, family: str, raw: Mapping[str, Any], written: Mapping[str, Any]) -> PreTrainedConfig:
    known = set(AutoConfig.for_model(family).to_dict()) | {"rope_theta", "rope_scaling", "head_dim", "model_type"}
    for name in written:  # the library takes any key and ignores those it does not know
        if name not in known:
            raise ConfigError(f"{key}.config: unknown key '{name}' for {family}{did_you_mean(name, known)}")
    rest = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map", "architectures")}
    try:
        return AutoConfig.for_model(family, **rest)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}: {family} refuses its config: {reason}") from error
