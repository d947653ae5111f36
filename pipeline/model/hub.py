"""Models of the Hugging Face Hub as sources: ``org/name`` or ``org/name@revision`` in place of a folder.

Only safetensors, JSON and tokenizer files at the top of a repository are fetched, so pickled weights and code are
never on the disk. A run pins the commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from data_prep.common.errors import UserError, one_line
from data_prep.common.yaml_files import read_yaml
from pipeline.config.schema import ConfigError, ModelConfig

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


def folder_of(key: str, source: str, *, weights: bool = False) -> Path:
    """Return the local folder of a source; one of the Hub is fetched into its cache, or found there offline.

    Args:
        key: the source's section in messages, such as ``model.llm``.
        source: a folder, ``org/name`` or ``org/name@revision``.
        weights: fetch the weights, too.

    Raises:
        ConfigError: the repository or its revision cannot be fetched; one line with the fix.
    """
    found = _hub_id(source)
    if found is None:
        return Path(source)
    patterns = _SMALL + (_WEIGHTS if weights else [])
    try:
        return Path(
            snapshot_download(
                found["repo"], revision=found["revision"], allow_patterns=patterns, ignore_patterns=_IGNORED
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        revision = f" --revision {found['revision']}" if found["revision"] else ""
        raise ConfigError(
            f"{key}.source={source} is no local folder, and the Hub cannot be asked ({type(error).__name__}: "
            f"{one_line(error)[:160]}): check the name, or run `hf download {found['repo']}{revision}` where there is "
            "a network and share its cache (HF_HOME), or give a folder"
        ) from error


def pin_sources(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """Return the model section with the commit of every Hub source; a run that exists keeps the commits it has.

    Raises ConfigError as :func:`folder_of` does.
    """
    towers = (tower.source for tower in model.extra_vision)
    if not any(map(_hub_id, (model.source, model.llm.source, model.vision.source, *towers))):
        return model
    before = _recorded(run_dir)
    return model.model_copy(
        update={
            "source": _pinned(model, "model", before).source,
            "llm": _pinned(model.llm, "model.llm", before),
            "vision": _pinned(model.vision, "model.vision", before),
            "extra_vision": [_pinned(tower, "model.extra_vision", before) for tower in model.extra_vision],
        }
    )


def local_sources(model: ModelConfig) -> ModelConfig:
    """Return the model section with every Hub source replaced by its folder, without weights. Raises ConfigError."""

    def local(key: str, part: Any) -> Any:
        return part.model_copy(update={"source": str(folder_of(key, part.source))}) if _hub_id(part.source) else part

    source = str(folder_of("model", model.source)) if _hub_id(model.source) else model.source
    towers = [local("model.extra_vision", tower) for tower in model.extra_vision]
    parts = {"llm": local("model.llm", model.llm), "vision": local("model.vision", model.vision)}
    return model.model_copy(update={**parts, "source": source, "extra_vision": towers})


def fetch_weights(model: ModelConfig) -> None:
    """Fetch the weights of every Hub source, before ranks wait for each other. Raises ConfigError."""
    sources = {"model": [model.source], "model.llm": [model.llm.source], "model.vision": [model.vision.source]}
    for key, own in (sources | {"model.extra_vision": [tower.source for tower in model.extra_vision]}).items():
        for source in own:
            folder_of(key, source, weights=True)


def _pinned(part: Any, key: str, before: Mapping[str, str]) -> Any:
    found = _hub_id(part.source)
    if found is None or _COMMIT.fullmatch(found["revision"] or ""):
        return part
    if found["revision"] is None and found["repo"] in before:
        return part.model_copy(update={"source": f"{found['repo']}@{before[found['repo']]}"})
    commit = folder_of(key, part.source).name
    return part.model_copy(update={"source": f"{found['repo']}@{commit}"})


def _hub_id(source: str) -> re.Match[str] | None:
    return None if not source or Path(source).exists() else _ID.fullmatch(source)


def _recorded(run_dir: Path) -> dict[str, str]:
    """Return the commits, by repository, that an earlier start of the run has recorded in its config.yaml."""
    try:
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
        model = dict(read_yaml(text, "config.yaml"))["model"]
        parts = [model, model["llm"], model["vision"], *model.get("extra_vision", [])]
        found = [_ID.fullmatch(str(part.get("source", ""))) for part in parts]
    except (OSError, UserError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # no earlier start, or a damaged file, which this start replaces
    return {each["repo"]: each["revision"] for each in found if each and _COMMIT.fullmatch(each["revision"] or "")}
