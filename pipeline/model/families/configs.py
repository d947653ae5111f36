"""Hugging Face configs of the language model and the vision tower, checked before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from data_prep.common.errors import did_you_mean, one_line, short_repr
from pipeline.config.schema import ConfigError, LlmConfig, TowerConfig
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.registry import LLM_FAMILIES, REFUSED, VISION_FAMILIES
from pipeline.model.families.vision import VisionFamily
from pipeline.model.limits import check_config_values, read_json

log = logging.getLogger(__name__)

Family: TypeAlias = LlmFamily | VisionFamily
F = TypeVar("F", bound=LlmFamily | VisionFamily)
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
ignored_keys: dict[Path, list[str]] = {}
"""Keys of ``config.json`` that this process has ignored, by model folder."""
_REFUSED_IN_FOLDERS = tuple(name for name, reason in FORBIDDEN.items() if reason is _WEIGHTS)


def llm_config(config: LlmConfig, *, vocab_size: int, base: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the decoder's config with at least ``vocab_size`` embedding rows and no dropout.

    ``base`` takes the place of the config in the source's folder. Raises ConfigError naming the key for a missing
    folder, an unsupported family, or a value it refuses.
    """
    raw = _merged("model.llm", config.source, config.config) if base is None else base
    raw = {**_nested("model.llm", raw, "text_config", LLM_FAMILIES), **config.config}
    family = _family("model.llm", raw, LLM_FAMILIES)
    rows = raw.get("vocab_size", 0)
    if not isinstance(rows, int):
        raise ConfigError(f"model.llm: vocab_size={short_repr(rows)} is not a whole number: fix vocab_size")
    raw["vocab_size"] = max(rows, vocab_size)
    return _without_dropout(_make("model.llm", family, family.prepared(raw), config.config))


def vision_config(
    config: TowerConfig, key: str = "model.vision", base: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """Return the tower's config without dropout and without the pooling head, which no connector uses.

    ``key`` names the tower in messages. ``base`` and errors are as in :func:`llm_config`; an image size smaller than a
    patch is refused, too.
    """
    raw = _merged(key, config.source, config.config) if base is None else base
    raw = {**_nested(key, raw, "vision_config", VISION_FAMILIES), **config.config}
    family = _family(key, raw, VISION_FAMILIES)
    return _without_dropout(_make(key, family, family.prepared(raw), config.config))


def config_from_dict(raw: Mapping[str, Any], known: Mapping[str, Family]) -> PreTrainedConfig:
    """Rebuild a config saved in a checkpoint or an export. Raises ConfigError as :func:`llm_config` does."""
    if not isinstance(raw, Mapping):
        raise ConfigError("the saved model description is damaged (a config is not a mapping): save the model again")
    refuse_forbidden("saved model", raw, FORBIDDEN)
    return _make("saved model", _family("saved model", raw, known), raw)


def config_keys(family: Family) -> frozenset[str]:
    """Return the keys that a config of this family may set.

    The rule: the fields that the family's own transformers config class declares, plus ``LEGACY_KEYS``. Everything the
    common base class or its keyword arguments would accept (attention implementations, remote code, quantization,
    label maps, ...) is not among them.
    """
    own = {field.name for field in fields(family.config_class)} - {field.name for field in fields(PreTrainedConfig)}
    own = {name for name in own if not name.startswith("_")}
    return frozenset(own | family.extra_keys | LEGACY_KEYS | {"model_type"})


def refuse_forbidden(where: str, raw: Mapping[str, Any], forbidden: Iterable[str]) -> None:
    """Refuse keys that can run or fetch something, or that state a format not supported. Raises ConfigError."""
    for name in forbidden:
        if raw.get(name):
            raise ConfigError(f"{where}: the key '{name}' is refused: {FORBIDDEN[name]}; remove it")


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every kind of dropout to 0: no step is random, so a resumed run equals an uninterrupted one."""
    for field in fields(config):
        if "drop" in field.name and isinstance(getattr(config, field.name), (int, float)):
            setattr(config, field.name, 0.0)
    return config


def _merged(key: str, source: str, overlay: Mapping[str, Any]) -> dict[str, Any]:
    return {**(folder_config(key, source) if source else {}), **overlay}


def folder_config(key: str, source: str) -> dict[str, Any]:
    """Return the ``config.json`` of a model folder without keys about code, which are named in a warning.

    Raises ConfigError naming ``key`` where there is none, or it is damaged or about quantized weights.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{key}.source={source} holds no config.json: give a local Hugging Face folder, or org/name of the Hub"
        )
    raw = read_json(path)
    refuse_forbidden(str(path), raw, _REFUSED_IN_FOLDERS)
    if ignored := [name for name in FORBIDDEN if raw.get(name)]:
        ignored_keys[path.parent] = ignored
        _warn_once(f"{path}: ignored {', '.join(ignored)}: nothing named in a config is run or downloaded")
    return {name: value for name, value in raw.items() if name not in FORBIDDEN}


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    log.warning(message)


def _nested(key: str, raw: Mapping[str, Any], inner: str, known: Mapping[str, Family]) -> dict[str, Any]:
    """Return the part's own config where ``raw`` describes a composite model that holds it under the key ``inner``."""
    owners = {name: family.model_type for family in known.values() for name in family.composites}
    if raw.get("model_type") not in owners:
        return dict(raw)
    nested = raw.get(inner) or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"{key}: {inner} of its config.json is not a mapping: copy the folder again")
    own = {"model_type": owners[raw["model_type"]], **nested}
    return {**own, "model_type": owners.get(own["model_type"], own["model_type"])}


def _family(key: str, raw: Mapping[str, Any], known: Mapping[str, F]) -> F:
    name = raw.get("model_type")
    if name is None:
        raise ConfigError(f"{key}: no model_type: set {key}.source to a local folder, or {key}.config.model_type")
    if not isinstance(name, str) or name not in known:
        if reason := REFUSED.get(str(name)):
            raise ConfigError(f"{key}: model_type {name!r} is not supported: {reason}")
        guess = did_you_mean(str(name), known)
        raise ConfigError(f"{key}: model_type {short_repr(name)} is not supported{guess}; known: {', '.join(known)}")
    return known[name]


def _make(key: str, family: Family, raw: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> Any:
    """Build the family's config from the keys it may set; ``written`` are the recipe's own, which must all be known."""
    known = config_keys(family)
    refuse_forbidden(f"{key}.config", written or {}, FORBIDDEN)
    for name in written or {}:
        if name not in known:
            raise ConfigError(
                f"{key}.config: unknown key {short_repr(name)} for {family.model_type}{did_you_mean(str(name), known)}"
            )
    kept = {name: value for name, value in raw.items() if name in known and name != "model_type"}
    check_config_values(key, kept, fewest_layers=family.fewest_layers)
    try:
        made = family.config_class(**kept)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{key}: {family.model_type} refuses its config: {one_line(error)}") from error
    if problem := family.problem(made):
        raise ConfigError(f"{key}.config: {problem}")
    return made
