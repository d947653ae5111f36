"""Recipes: YAML files with the keys of `RunConfig`, shipped in ``pipeline/recipes`` or the user's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import did_you_mean
from pipeline.config import ConfigError, RunConfig, build_config

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo_sft"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def load_config(recipe: str, overrides: Iterable[tuple[str, Any]] = ()) -> RunConfig:
    """Read a recipe, lay ``("train.lr", "1e-4")`` pairs over it and validate. Raises ConfigError."""
    raw = read_recipe(recipe)
    raw.setdefault("run_dir", f"runs/{Path(recipe).stem}")
    for key, value in overrides:
        raw = merge(raw, _nest(key, value))
    return build_config(raw, origin=recipe)


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe as a nested dictionary: ``extends`` chain merged, ``${VAR:-default}`` expanded."""
    path = recipe_path(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, not a {type(raw).__name__}")
    raw = {key: _expand(value, path) for key, value in raw.items()}
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    sibling = path.parent / f"{parent}.yaml"
    return merge(read_recipe(str(sibling) if sibling.is_file() else parent), raw)


def recipe_path(name: str) -> Path:
    """Resolve a shipped recipe's name or a YAML file. Raises ConfigError with the closest name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"recipe file {name} does not exist")
        return Path(name)
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name not in shipped:
        listing = ", ".join(sorted(shipped))
        raise ConfigError(f"unknown recipe '{name}'{did_you_mean(name, shipped)}; shipped: {listing}")
    return shipped[name]


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that is itself a recipe."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one nested dictionary over another; a model's ``config`` of another ``model_type`` replaces the old one."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_model(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _same_model(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return bool(new.get("model_type", old.get("model_type")) == old.get("model_type"))


def _nest(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def _expand(value: Any, path: Path) -> Any:
    """Replace ``${VAR}`` and ``${VAR:-default}`` in every string."""
    if isinstance(value, dict):
        return {key: _expand(entry, path) for key, entry in value.items()}
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name not in os.environ and default is None:
            raise ConfigError(f"{path}: set the environment variable {name} (used in '{value}')")
        return os.environ.get(name) or default or ""

    return _VARIABLE.sub(lookup, value)
