"""Settings that differ from a run's checkpoint: which ones change the result of the run, and which do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.manifest import CheckpointManifest
from pipeline.config.schema import ConfigError, RunConfig, known_keys

CHANGES_RESULT = frozenset({
    "model.vision.frozen", "model.lora.rank", "model.lora.alpha", "model.lora.rslora", "model.lora.targets",
    "mask.policy", "mask.layers", "data.packs", "data.draft_jpeg", "train.global_batch_size", "train.steps",
    "train.epochs", "train.freeze", "train.lr", "train.lr_of", "train.schedule", "train.decay_steps", "train.min_lr",
    "train.warmup_steps", "train.weight_decay", "train.beta1", "train.beta2", "train.eps", "train.clip_norm",
    "train.dtype",
})  # fmt: skip
"""Keys that may only change on resume with ``--allow-change``. All others concern logging, saving, ranks and timeouts;
the function of the model is compared by `check_same_model`."""
_WHOLE = frozenset({"train.lr_of", "eval.packs"})
"""Mappings that are compared as a whole: their keys are the user's."""
_NO_CHANGE = frozenset({"run_dir", "init_from"})
_FREE = ("model.llm.config.", "model.vision.config.", "model.connector.")
"""Sections whose keys the schema does not list."""


@dataclass(frozen=True)
class Change:
    """One setting that differs from the checkpoint."""

    key: str
    old: Any
    new: Any
    changes_result: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def settings_changed(
    saved: CheckpointManifest, config: RunConfig, *, plan_sha256: str, dtype: str | None
) -> list[Change]:
    """Return the settings in which a run differs from its checkpoint.

    Args:
        saved: Manifest of the checkpoint.
        config: The run's configuration.
        plan_sha256: Identity of the order of its rows; packs with the same one may lie anywhere.
        dtype: Its resolved compute type, ``bfloat16`` or ``float32``: ``train.dtype: auto`` depends on the machine.
            None = not known, as in a dry run on another machine.
    """
    same = {"data.packs": saved.plan_sha256 == plan_sha256, "train.dtype": dtype in (None, saved.model.get("dtype"))}
    new, standard, before = (
        dict(leaves(tree, whole=_WHOLE)) for tree in (config.model_dump(), RunConfig().model_dump(), saved.config)
    )
    defaults = {key: value for key, value in standard.items() if key in CHANGES_RESULT}
    old = defaults | before  # a checkpoint older than a key was trained with its default
    changes = [
        Change(key, old.get(key), new.get(key), key in CHANGES_RESULT and not same.get(key, False))
        for key in sorted((old | new).keys() - _NO_CHANGE)
        if old.get(key) != new.get(key) and _comparable(key, old, new)
    ]
    found = {change.key for change in changes}
    if not same["data.packs"] and "data.packs" not in found:
        changes.append(Change("data.packs", saved.plan_sha256[:12], plan_sha256[:12], True))
    if not same["train.dtype"] and "train.dtype" not in found:
        changes.append(Change("train.dtype", saved.model["dtype"], dtype, True))
    return changes


def _comparable(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both sides state a key. A key that only the new side states is newer, unless it is of a free section."""
    if key.startswith("model.connector."):  # an option that one side leaves out has its default
        return key in old and key in new
    return key in old or key.startswith("model.")


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Whether ``--allow-change`` names a key or a section that holds it."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def check_allowed_keys(allowed: Sequence[str]) -> None:
    """Refuse an ``--allow-change`` that has no effect. Raises ConfigError."""
    known = known_keys()
    for name in allowed:
        if name not in known and not name.startswith(_FREE):
            raise ConfigError(f"--allow-change {name}: there is no such key; --print-config lists all")


def refuse_changes(origin: str, changes: Sequence[Change], allowed: Sequence[str]) -> None:
    """Refuse changes of the result that ``--allow-change`` does not name. Raises ConfigError."""
    refused = [change for change in changes if change.changes_result and not is_allowed(change.key, allowed)]
    if refused:
        listing = ", ".join(map(str, refused))
        flags = " ".join(f"--allow-change {change.key}" for change in refused)
        raise ConfigError(
            f"{origin} was trained with other settings, which would change the result ({listing}): restore them, "
            f"start another --run-dir with --init-from, or add {flags}"
        )


def leaves(tree: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested mapping; mappings under the keys of ``whole`` are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in whole:
            yield from leaves(value, f"{prefix}{key}.", whole)
        else:
            yield prefix + key, value
