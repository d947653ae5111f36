"""Where a run's weights come from, checked before anything is built: its own checkpoints, another run, an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.packs import Manifest
from data_prep.tokenizer import Tokenizer
from pipeline.config import ConfigError, RunConfig
from pipeline.training.checkpoint import Checkpoint, checkpoint_folders, open_checkpoint


def is_export(path: str) -> bool:
    """Whether ``init_from`` names an export folder rather than a run or a checkpoint."""
    return (Path(path) / "config.json").is_file()


def check_resume(config: RunConfig, manifest: Manifest) -> None:
    """Refuse to continue a run on other data: the order of rows is part of its state. Raises ConfigError."""
    for folder in checkpoint_folders(Path(config.run_dir)):
        try:
            saved = Checkpoint(folder).manifest
        except UserError:  # damaged: reported when the run looks for a whole one
            continue
        if saved.plan_sha256 != manifest.plan_sha256:
            raise ConfigError(
                f"{folder} was trained on packs with another plan than {config.data.packs} has: "
                "give the packs it was started with, or another --run-dir (with --init-from for its weights)"
            )
        if saved.batch_packs != config.train.batch_packs:
            raise ConfigError(
                f"{folder} was trained with train.batch_packs={saved.batch_packs}, now {config.train.batch_packs}: "
                "keep it, or start another --run-dir with --init-from"
            )
        return


def changed_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return ``key: old -> new`` of the settings in which a run goes on differently from its checkpoint."""
    old, new = dict(_leaves(saved)), dict(_leaves(config.model_dump()))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key != "run_dir"]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_init_from(config: RunConfig, manifest: Manifest) -> None:
    """Refuse weights that were trained with another tokenizer than the packs'. Raises UserError.

    A run that has checkpoints of its own takes nothing from ``init_from`` any more, which may be gone by then.
    """
    source = config.init_from
    if not source or checkpoint_folders(Path(config.run_dir)):
        return
    if is_export(source):
        theirs = Tokenizer.load(Path(source) / "tokenizer").sha256
    else:
        theirs = str(open_checkpoint(source).meta["tokenizer_sha256"])
    if theirs != manifest.tokenizer_sha256:
        raise ConfigError(
            f"init_from={source} was trained with another tokenizer than the packs in {config.data.packs}: "
            "make the packs with its tokenizer (tokenizer: path in the data recipe)"
        )
