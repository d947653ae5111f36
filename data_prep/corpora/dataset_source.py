"""Rows that the ``datasets`` library provides: folders of ``save_to_disk``, Hub names and local dataset folders.

A dataset that is not streamed lies in Arrow files (of ``save_to_disk``, or in the cache of ``datasets``), which are
read as any others. A streamed one is read shard by shard and never stored. Nothing of a dataset runs: loading scripts
and formats that may hold code are refused.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.common.errors import UserError, did_you_mean, one_line

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Marker files of ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk``."""
FORMATS = ("parquet", "arrow", "json", "csv", "cache")
"""Builders of ``datasets`` that give plain rows and run no code; ``cache`` is what it stored earlier."""
REACH_S = 5.0
"""Seconds to wait for the Hub before working offline: nodes of a cluster often have no way out."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class DatasetSource(BaseModel):
    """A dataset that ``datasets.load_dataset`` loads."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """Name on the Hugging Face Hub (``owner/name``), or a local folder of data files, relative to the recipe's root."""
    name: str | None = None
    """Configuration of the dataset; default: its only or default one."""
    split: str = "train"
    """Split, by its name."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; default: the newest. The commit that was read is pinned in ``OUT/ingest`` and
    recorded in the manifest of the packs."""
    streaming: bool = False
    """Read rows from the Hub without storing the dataset. Needs the network in every step; duplicate ids are not
    detected."""

    @field_validator("split")
    @classmethod
    def _is_a_name(cls, split: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError("must be the name of one split, not a slice or a sum of splits")
        return split

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def is_local(self, root: Path) -> bool:
        """Return whether the path is a folder below ``root``."""
        return (root / self.path).is_dir()

    def arrow_files(self, root: Path) -> list[Path]:
        """Return the Arrow files that hold the split, in order; downloads what the cache lacks. Raises UserError."""
        if self.is_local(root) and is_saved(root / self.path):
            return saved_files(root / self.path / self.split if _has_splits(root / self.path) else root / self.path)
        return [Path(file["filename"]) for file in _stored(self, str(root)).cache_files]

    def local_files(self, root: Path) -> list[Path]:
        """Return the files of a local dataset folder; none for a name on the Hub."""
        folder = root / self.path
        return sorted(path for path in folder.rglob("*") if path.is_file()) if self.is_local(root) else []

    def stream_shards(self, root: Path) -> int:
        """Return the number of shards of a streamed split. Raises UserError."""
        return int(_streamed(self, str(root)).num_shards)

    def stream(self, root: Path, shard: int) -> Iterator[object]:
        """Yield the rows of one shard of a streamed split; images as ``{bytes, path}``. Raises UserError."""
        dataset = _streamed(self, str(root)).decode(False)
        with _errors_of(self):
            yield from dataset.shard(num_shards=dataset.num_shards, index=shard)

    def pinned(self, root: Path) -> DatasetSource:
        """Return the source with the commit that is read now as its revision; local folders have none."""
        if self.is_local(root) or self.is_pinned:
            return self
        commit = _builder(self, str(root)).hash
        if not (commit and _COMMIT.fullmatch(commit)):
            raise UserError(f"dataset {self.path}: its commit is unknown (found {commit!r}): set dataset.revision")
        return self.model_copy(update={"revision": commit})


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    return (folder / STATE).is_file() or _has_splits(folder)


def _has_splits(folder: Path) -> bool:
    return (folder / SPLITS).is_file()


def splits_of(folder: Path) -> list[str]:
    """Return the splits of a folder written by ``DatasetDict.save_to_disk``; empty for a single dataset."""
    if not _has_splits(folder):
        return []
    return [str(name) for name in _read(folder / SPLITS, "splits")]


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a dataset written by ``save_to_disk``, in order.

    Raises:
        UserError: it is not such a folder, holds several splits, or a file is missing.
    """
    if splits := splits_of(folder):
        raise UserError(f"{folder} holds the splits {', '.join(splits)}: name one, such as {folder.name}/{splits[0]}")
    if not (folder / STATE).is_file():
        known = splits_of(folder.parent)
        hint = f"{did_you_mean(folder.name, known)}; {folder.parent} has {', '.join(known)}" if known else ""
        raise UserError(f"{folder} is not a folder written by save_to_disk (no {STATE}){hint}")
    paths = [folder / str(file["filename"]) for file in _read(folder / STATE, "_data_files")]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise UserError(f"{folder / STATE}: lists {path.name}, which is missing; copy the folder again")
    return paths


def _read(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        assert isinstance(found, list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as problem:
        raise UserError(f"{path}: damaged ({one_line(problem)}); copy the folder again") from None
    return found


@lru_cache(maxsize=8)
def _builder(source: DatasetSource, root: str) -> Any:
    datasets = _library()
    path = _place(source, Path(root))
    with _errors_of(source):
        builder = datasets.load_dataset_builder(path, source.name, revision=source.revision)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in FORMATS:
        raise UserError(f"dataset {source.path}: format {kind} is not supported; use one of {', '.join(FORMATS)}")
    if not source.is_local(Path(root)):
        _check_revision(source, str(builder.hash), offline=kind == "cache")
    return builder


def _check_revision(source: DatasetSource, commit: str, *, offline: bool) -> None:
    """Refuse another commit than the one asked for: offline, ``datasets`` takes the newest of its cache."""
    if source.is_pinned and commit != source.revision:
        raise UserError(
            f"dataset {source.path}: the cache holds commit {commit}, not {source.revision}: load that one on a node "
            "with network, or set dataset.revision to the commit that is there"
        )
    if offline and source.revision and not source.is_pinned:
        raise UserError(
            f"dataset {source.path}: the Hub cannot be reached to look up revision {source.revision!r}: set "
            f"dataset.revision to a commit (the cache holds {commit})"
        )


@lru_cache(maxsize=8)
def _stored(source: DatasetSource, root: str) -> Any:
    """Return the split from the cache, which is filled first."""
    builder = _builder(source, root)
    with _errors_of(source):
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split, in_memory=False)


@lru_cache(maxsize=8)
def _streamed(source: DatasetSource, root: str) -> Any:
    builder = _builder(source, root)
    with _errors_of(source):
        return builder.as_streaming_dataset(split=source.split)


def _place(source: DatasetSource, root: Path) -> str:
    """Return what ``load_dataset`` is given: the folder of a local dataset, or the name on the Hub."""
    if source.is_local(root):
        return str(root / source.path)
    if not _HUB_NAME.fullmatch(source.path):
        raise UserError(f"dataset {source.path}: neither a folder below {root} nor a name on the Hub (owner/name)")
    return source.path


class _errors_of:  # noqa: N801 - reads as a statement
    """Turns every error of ``datasets`` into one line: the library raises dozens of types."""

    def __init__(self, source: DatasetSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        hint = "; the Hub cannot be reached and the cache does not hold it: load it once on a node with network"
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not isinstance(error, ValueError)
        words = one_line(error)
        raise UserError(f"dataset {self._source.path}: {words[:300]}{hint if offline else ''}") from error


def _library() -> Any:
    """Import ``datasets`` (slow, so only where it is needed), in offline mode where the Hub cannot be reached."""
    if os.environ.get("HF_HUB_OFFLINE") is None and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported; else it retries for minutes
    import datasets

    datasets.disable_progress_bars()
    return datasets


@lru_cache(maxsize=1)
def _hub_answers() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=REACH_S):
            return True
    except OSError:
        return False


def stream_name(shard: int) -> str:
    """Return the name of a shard of a streamed dataset."""
    return f"stream-{shard:05d}"


def stream_number(name: str) -> int:
    """Return the number of a shard of a streamed dataset."""
    return int(name.removeprefix("stream-"))
