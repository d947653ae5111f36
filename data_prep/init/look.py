"""What files and folders hold: one corpus for each thing that a reader can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.corpora.dataset_source import is_saved, saved_files, splits_of
from data_prep.corpora.files import SUFFIXES
from data_prep.corpora.image_folder import CAPTION_SUFFIXES, IMAGE_SUFFIXES, walk
from data_prep.init.sniff import Columns, Sniffed, sniff, sniff_rows

MAX_FILES = 1_000_000
MAX_FOLDERS = 500
"""Folders that are tried as the image folder of a table."""
_HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test", "eval")


@dataclass(frozen=True)
class Wishes:
    """What the user decides beforehand."""

    columns: Columns = field(default_factory=Columns)
    images: Path | None = None
    """Folder of the images that tables name."""
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Found:
    """One corpus that was recognised."""

    place: Path
    what: str
    kind: str
    """Corpus type."""
    options: dict[str, Any]
    files: dict[str, Path]
    """Options that are paths, absolute; they end up relative to the recipe's root."""
    notes: list[str] = field(default_factory=list)
    documents: bool = False
    held_out: bool = False
    """Whether it is a split for evaluation."""

    @property
    def name(self) -> str:
        """A name for the corpus, made of its file's or folder's."""
        stem = self.place.stem if self.place.is_file() or "*" in self.place.name else self.place.name
        if "*" in stem:
            stem = self.place.parent.name
        elif stem.lower() in (*_HELD_OUT_SPLITS, "train", "data"):
            stem = f"{self.place.parent.name}_{stem}"
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", stem).strip("._-+") or "data"


def look(path: Path, wishes: Wishes) -> list[Found]:
    """Return the corpora of a file or folder.

    Raises:
        UserError: it does not exist, or holds nothing that a reader can read; the message says what was tried.
    """
    place = path.expanduser().resolve()
    if not place.exists():
        raise UserError(f"{path}: does not exist")
    if place.is_file():
        return [_file(place, wishes)]
    return _saved(place, wishes) if is_saved(place) else _folder(place, wishes)


def _file(path: Path, wishes: Wishes) -> Found:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _tars(path, path)
    if suffix in SUFFIXES:
        return _table(path, [path], wishes)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"{path}: one image: give its folder, in which every image has a caption file of its name")
    raise UserError(f"{path}: not a format that is read: {', '.join((*SUFFIXES, '.tar'))}, or a folder")


def _saved(folder: Path, wishes: Wishes) -> list[Found]:
    """Return the splits of a folder written by ``save_to_disk``."""
    splits = splits_of(folder)
    if not splits:
        return [_table(folder, saved_files(folder), wishes)]
    found = [_table(folder / name, saved_files(folder / name), wishes) for name in splits]
    _mark_held_out(found, splits)
    return found


def _mark_held_out(found: Sequence[Found], names: Sequence[str]) -> None:
    """Take splits named like evaluation sets out of training, if others remain."""
    kept = [name for name in names if name.lower() not in _HELD_OUT_SPLITS]
    for corpus, name in zip(found, names, strict=True):
        corpus.held_out = bool(kept) and name not in kept
        if corpus.held_out:
            corpus.notes.append(f"'{name}' is named like an evaluation split: it goes into the pack set eval only")


def _folder(folder: Path, wishes: Wishes) -> list[Found]:
    names = sorted(islice(walk(folder), MAX_FILES))
    images = {str(Path(name).with_suffix("")) for name in names if _is(name, IMAGE_SUFFIXES)}
    captions = [name for name in names if _is(name, CAPTION_SUFFIXES) and str(Path(name).with_suffix("")) in images]
    tars = [name for name in names if _is(name, (".tar",))]
    saved = [folder / Path(name).parent for name in names if is_saved(folder / Path(name).parent)]
    found, reasons = list[Found](), list[str]()
    if tars:
        below = {str(Path(name).parent) for name in tars}
        found.append(_tars(folder, folder / (Path(below.pop()) / "*.tar" if len(below) == 1 else "**/*.tar")))
    for place in dict.fromkeys(saved):
        found += _saved(place, wishes) if place.parent not in saved else []
    inside, beside = tuple(f"{place}/" for place in saved), set(captions)
    tables = [folder / name for name in names if _is(name, SUFFIXES) and name not in beside]
    for group in _groups([path for path in tables if path.is_file() and not str(path).startswith(inside)]):
        try:
            found.append(
                _table(group[0] if len(group) == 1 else group[0].parent / f"*{group[0].suffix}", group, wishes)
            )
        except UserError as problem:
            reasons.append(str(problem))
    if captions:
        without = len(images) - len({str(Path(name).with_suffix("")) for name in captions})
        notes = [f"images without a caption file, which will be rejected: {without:,}"] if without else []
        what = f"{len(images):,} images with caption files"
        found.append(Found(folder, what, "image_folder", {}, {"images": folder}, notes, documents=True))
    if not found:
        seen = f"{len(images):,} images without caption files (a.jpg needs a.txt or a.json)" if images else "no data"
        raise UserError("; ".join([*reasons, f"{folder}: {seen}"]))
    found[0].notes += [f"not used: {reason}" for reason in reasons]
    return found


def _is(name: str, suffixes: Iterable[str]) -> bool:
    return Path(name).suffix.lower() in suffixes


def _groups(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield data files by folder and suffix: shards of one table, unless their names say that they are splits."""
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in paths:
        word = re.split(r"[-_.\d]", path.stem.lower())[0]
        groups.setdefault((path.parent, path.suffix, word), []).append(path)
    by_folder: dict[tuple[Path, str], list[list[Path]]] = {}
    for (folder, suffix, _), group in groups.items():
        by_folder.setdefault((folder, suffix), []).append(group)
    for several in by_folder.values():
        if len(several) == 1:
            yield several[0]
        else:
            for group in several:
                yield from ([path] for path in group)


def _tars(place: Path, tars: Path) -> Found:
    return Found(place, "tars of images with captions", "webdataset", {}, {"tars": tars}, documents=True)


def _table(place: Path, files: Sequence[Path], wishes: Wishes) -> Found:
    """Return the corpus of a table that lies in some files of one format."""
    if not files:
        raise UserError(f"{place}: holds no rows")
    sniffed = sniff(files[0], sniff_rows(files[0]), wishes.columns, wishes.roles)
    paths = {"conversations" if sniffed.kind == "llava" else "data": place}
    notes = list(sniffed.notes)
    images = _image_folder(place, sniffed, wishes.images, notes)
    if images is not None:
        paths["images"] = images
    elif sniffed.kind in ("llava", "interleaved"):
        paths["images"] = files[0].parent
    found = Found(place, sniffed.what, sniffed.kind, sniffed.options, paths, notes, sniffed.documents)
    held_out = re.split(r"[-_.]", place.stem.lower())[0] in _HELD_OUT_SPLITS and len(files) == 1 and place.is_file()
    if held_out:
        notes.append("its name is that of an evaluation split; give it alone to train on it")
    found.held_out = held_out
    return found


def _image_folder(place: Path, sniffed: Sniffed, wished: Path | None, notes: list[str]) -> Path | None:
    """Return the folder under which most of the images that a table names exist; None where it names none.

    Raises UserError where there is no such folder.
    """
    names = [name for name in sniffed.image_names if not re.match(r"[a-z0-9]+:", name, re.IGNORECASE)]
    if not names:
        return wished.resolve() if wished else None
    if absolute := next((name for name in names if name.startswith("/")), None):
        raise UserError(
            f"{place}: the image {absolute} has an absolute path; readers stay below one folder: remove its beginning "
            "from the rows and give that folder with --images"
        )
    folders = [wished.resolve()] if wished else list(islice(_candidates(place), MAX_FOLDERS))
    hits = {folder: sum((folder / name).is_file() for name in names) for folder in folders}
    best = max(folders, key=lambda folder: hits[folder])
    if not hits[best]:
        where = f"under {wished}" if wished else f"near {place}"
        raise UserError(f"{place}: no image file {names[0]} {where}: name the folder of the images with --images")
    notes.append(f"{hits[best]} of {len(names)} image names of the first rows exist in {best}")
    others = [folder for folder in folders if folder != best and hits[folder]]
    if others:
        notes.append(f"{others[0]} has images of these names too (--images)")
    return best


def _candidates(place: Path) -> Iterator[Path]:
    """Yield folders that may hold the images of a table, the nearest first."""
    base = place.parent if place.is_file() or "*" in place.name else place
    for start in (base, base.parent):
        yield start
        below = sorted(path for path in start.iterdir() if path.is_dir() and not path.name.startswith("."))
        yield from below
        yield from (inner for path in below for inner in sorted(path.iterdir()) if inner.is_dir())
