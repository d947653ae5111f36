"""Pins datasets of the Hub to the commit that was read first, so that every step and every process reads the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from data_prep.common.files import temporary_beside
from data_prep.corpora.dataset_source import DatasetSource
from data_prep.recipe import CorpusConfig, Recipe


def pin_datasets(recipe: Recipe) -> Recipe:
    """Return a recipe in which every dataset of the Hub has a commit as its revision.

    The commit is found once per output folder and kept in ``OUT/ingest/dataset-*.json``; to read a newer one, name it
    in the recipe or delete that file. Invalid sources are left to the reader to refuse. Raises UserError.
    """
    corpora = {name: _pinned(config, recipe) for name, config in recipe.corpora.items()}
    return recipe.model_copy(update={"corpora": corpora})


def _pinned(config: CorpusConfig, recipe: Recipe) -> CorpusConfig:
    given = config.options.get("dataset")
    if given is None:
        return config
    try:
        source = DatasetSource.model_validate(given)
    except ValidationError:
        return config
    if source.is_local(recipe.root_dir) or source.is_pinned:
        return config
    name = "-".join(part.replace("/", "--") for part in (source.path, source.name, source.revision) if part)
    commit = _first(recipe.out_dir / "ingest" / f"dataset-{name}.json", source, recipe.root_dir)
    return CorpusConfig(**{**config.model_dump(), "dataset": {**given, "revision": commit}})


def _first(file: Path, source: DatasetSource, root: Path) -> str:
    """Return the commit in ``file``; write the newest one to it first if there is none."""
    if not file.is_file():
        temporary = temporary_beside(file)
        temporary.write_text(json.dumps({"commit": source.pinned(root).revision}) + "\n", encoding="utf-8")
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass  # another process was first: its commit counts
        finally:
            temporary.unlink()
    return str(json.loads(file.read_text(encoding="utf-8"))["commit"])
