"""Recipes: YAML files with the keys of `RunConfig`, shipped in ``pipeline/recipes`` or written by the user."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import did_you_mean
from data_prep.common.yaml_files import expand, read_mapping
from pipeline.config.schema import ConfigError, ConnectorConfig, RunConfig, build_config

RECIPES = Path(__file__).parents[1] / "recipes"
YAML = (".yaml", ".yml")
DEFAULT_RECIPE = "demo_sft"


def load_config(recipe: str, overrides: Iterable[tuple[str, Any]] = (), notes: list[str] | None = None) -> RunConfig:
    """Read a recipe, apply ``("train.lr", "1e-4")`` overrides and validate.

    Args:
        recipe: shipped name or YAML file.
        overrides: dotted keys and values.
        notes: receives a line for each model whose inherited keys were dropped, see `merge`.

    Raises:
        UserError: the recipe, a key or a value is invalid.
    """
    notes = [] if notes is None else notes
    raw = read_recipe(recipe, notes)
    whole = expand(merge(raw, _tree(overrides), notes), recipe)
    return build_config({**whole, "run_dir": whole.get("run_dir") or f"runs/{Path(recipe).stem}"}, origin=recipe)


def read_recipe(name: str, notes: list[str] | None = None, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe as a nested dictionary with its ``extends`` chain merged; variables are not yet expanded.

    ``extends`` names a file in the same folder, with or without its suffix, or a shipped recipe. ``below`` holds the
    recipes that extend this one.
    """
    path = recipe_path(name)
    if path.resolve() in below:
        raise ConfigError(f"{path}: 'extends' forms a cycle: extend another recipe")
    raw = read_mapping(path)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    beside = path.parent / (parent if str(parent).endswith(YAML) else f"{parent}.yaml")
    found = beside.is_file() and beside.resolve() != path.resolve()
    return merge(read_recipe(str(beside if found else parent), notes, (*below, path.resolve())), raw, notes)


def recipe_path(name: str) -> Path:
    """Return the file of a shipped recipe or of a path that ends in .yaml. Raises ConfigError with the closest name."""
    if name.endswith(YAML):
        if not Path(name).is_file():
            raise ConfigError(f"recipe file {name} does not exist")
        return Path(name)
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name not in shipped:
        listing = ", ".join(sorted(shipped))
        raise ConfigError(f"unknown recipe '{name}'{did_you_mean(name, shipped)}; shipped: {listing}")
    return shipped[name]


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, which is itself a valid recipe."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def merge(
    base: dict[str, Any], over: dict[str, Any], notes: list[str] | None = None, place: str = ""
) -> dict[str, Any]:
    """Merge ``over`` into ``base``; a model ``config`` of a different ``model_type`` replaces the inherited one, and so
    does a connector of a different ``kind``.

    Each replacement adds a line with the dropped keys to ``notes``: a key that the new model shares, such as
    ``hidden_size``, would otherwise silently have the library's default. ``place`` is the dotted key of both.
    """
    merged = dict(base)
    for key, value in over.items():
        old, here = merged.get(key), f"{place}{key}"
        if isinstance(old, dict) and isinstance(value, dict):
            name = _changed(old, value, here)
            if not name:
                value = merge(old, value, notes, f"{here}.")
            elif notes is not None and (dropped := sorted(map(str, old.keys() - value.keys() - {name}))):
                change = f"{here}.{name} changes from {old.get(name)} to {value[name]}"
                notes.append(f"{change}, which drops the inherited {', '.join(dropped)}: set those you want to keep")
        merged[key] = value
    return merged


def _changed(old: dict[str, Any], new: dict[str, Any], place: str) -> str:
    """Return the key that turns a section into another model's, if ``new`` changes it; else an empty string."""
    name, default = ("kind", ConnectorConfig().kind) if place == "model.connector" else ("model_type", None)
    before = old.get(name, default)
    return name if new.get(name, before) != before else ""


def _tree(overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nest dotted keys. All flags are merged at once, so their order does not matter."""
    tree: dict[str, Any] = {}
    for key, value in overrides:
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
