"""Hugging Face configs of the language model and the vision tower, checked before anything is built."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data_prep.common.errors import did_you_mean, one_line, short_repr
from pipeline.config.schema import ConfigError, LlmConfig, VisionConfig
from pipeline.model.limits import check_config_values, read_bounded

log = logging.getLogger(__name__)

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
LEGACY_KEYS = frozenset(
    {
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "rope_local_base_freq",
        "sliding_window_pattern",
    }
)
"""Keys of older releases that transformers still converts, and ``head_dim``, which every decoder reads."""
_CODE = "it can make transformers import or download code"
_WEIGHTS = "only plain fp32, fp16 or bf16 weights are supported"
FORBIDDEN: Mapping[str, str] = {
    "attn_implementation": _CODE,
    "_attn_implementation": _CODE,
    "_attn_implementation_internal": _CODE,
    "experts_implementation": _CODE,
    "_experts_implementation": _CODE,
    "_experts_implementation_internal": _CODE,
    "auto_map": _CODE,
    "trust_remote_code": _CODE,
    "custom_pipelines": _CODE,
    "code_revision": _CODE,
    "kernel_config": _CODE,
    "use_kernels": _CODE,
    "quantization_config": _WEIGHTS,
    "compression_config": _WEIGHTS,
}
"""Keys no config may set, with the reason.

They are refused in recipes, checkpoints and exports. In the ``config.json`` of a model folder, where published models
carry some of them, those about code are ignored and named in a warning; those about weights are refused.
"""
_REFUSED_IN_FOLDERS = tuple(name for name, reason in FORBIDDEN.items() if reason is _WEIGHTS)
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


def llm_config(config: LlmConfig, *, vocab_size: int) -> PreTrainedConfig:
    """Return the decoder's config with at least ``vocab_size`` embedding rows and no dropout.

    Raises ConfigError naming the key for a missing folder, an unsupported family, or a value it refuses.
    """
    raw = _merged("model.llm", config.source, config.config)
    family = _family("model.llm", raw, LLM_FAMILIES)
    rows = raw.get("vocab_size", 0)
    if not isinstance(rows, int):
        raise ConfigError(f"model.llm: vocab_size={short_repr(rows)} is not a whole number: fix vocab_size")
    raw["vocab_size"] = max(rows, vocab_size)
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
        nested = raw.get("vision_config") or {}
        if not isinstance(nested, dict):
            raise ConfigError("model.vision: vision_config of its config.json is not a mapping: copy the folder again")
        raw = {"model_type": _COMPOSITE[raw["model_type"]], **nested, **config.config}
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
    if not isinstance(raw, Mapping):
        raise ConfigError("the saved model description is damaged (a config is not a mapping): save the model again")
    refuse_forbidden("saved model", raw, FORBIDDEN)
    return _make("saved model", _family("saved model", raw, known), raw)


def config_keys(family: str) -> frozenset[str]:
    """Return the keys that a config of this family may set.

    The rule: the fields that the family's own transformers config class declares, plus ``LEGACY_KEYS``. Everything the
    common base class or its keyword arguments would accept (attention implementations, remote code, quantization,
    label maps, ...) is not among them.
    """
    own = {field.name for field in fields(CONFIG_MAPPING[family])} - {field.name for field in fields(PreTrainedConfig)}
    return frozenset(own | LEGACY_KEYS | {"model_type"})


def refuse_forbidden(where: str, raw: Mapping[str, Any], forbidden: Iterable[str]) -> None:
    """Refuse keys that can run or fetch something, or that state a format not supported. Raises ConfigError."""
    for name in forbidden:
        if raw.get(name):
            raise ConfigError(f"{where}: the key '{name}' is refused: {FORBIDDEN[name]}; remove it")


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
        raw = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({one_line(error)}): copy the model's folder again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object: copy the model's folder again")
    refuse_forbidden(str(path), raw, _REFUSED_IN_FOLDERS)
    if ignored := [name for name in FORBIDDEN if raw.get(name)]:
        _warn_once(f"{path}: ignored {', '.join(ignored)}: nothing named in a config is run or downloaded")
    return {**{name: value for name, value in raw.items() if name not in FORBIDDEN}, **overlay}


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    log.warning(message)


def _family(key: str, raw: Mapping[str, Any], known: tuple[str, ...]) -> str:
    family = raw.get("model_type")
    if family is None:
        raise ConfigError(f"{key}: no model_type: set {key}.source to a local folder, or {key}.config.model_type")
    if family not in known:
        guess = did_you_mean(str(family), known)
        raise ConfigError(f"{key}: model_type {short_repr(family)} is not supported{guess}; known: {', '.join(known)}")
    return str(family)


def _make(key: str, family: str, raw: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Build the family's config from the keys it may set; ``written`` are the recipe's own, which must all be known."""
    known = config_keys(family)
    refuse_forbidden(f"{key}.config", written or {}, FORBIDDEN)
    for name in written or {}:
        if name not in known:
            raise ConfigError(
                f"{key}.config: unknown key {short_repr(name)} for {family}{did_you_mean(str(name), known)}"
            )
    kept = {name: value for name, value in raw.items() if name in known and name != "model_type"}
    check_config_values(key, kept)
    try:
        return AutoConfig.for_model(family, **kept)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{key}: {family} refuses its config: {one_line(error)}") from error
