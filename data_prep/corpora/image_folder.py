"""Folders of images with captions in text files of the same name, as trainers of image models use them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from data_prep.corpora.base import RawFolder, Row, RowCorpus, as_row
from data_prep.corpora.fields import clean_text, find_image, require_text
from data_prep.example import Example, Turn
from data_prep.quarantine import BadSample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
CAPTION_SUFFIXES = (".txt", ".json")
MAX_CAPTION_BYTES = 1 << 20


class ImageFolder(RowCorpus):
    """Images with a caption file of the same name: ``a/1.jpg`` with ``a/1.txt`` or ``a/1.json``.

    Every image below ``images`` is a sample; its id is its path. Hidden files and links to folders are skipped.
    """

    images: RawFolder = Path()
    """Folder of the images, searched with all folders below it."""
    captions: RawFolder | None = None
    """Folder of the caption files, with the same paths as the images; default: next to the images."""
    caption_key: str = "caption"
    """Key of the caption in a ``.json`` file."""

    def read_rows(self) -> Sequence[object]:
        """List the images with their caption files, sorted by path."""
        return [{"image": name, "file": self._captions.get(_stem(name))} for name in self._images]

    def row_id(self, row: Row) -> str:
        """Return the path of the image below ``images``."""
        return clean_text(str(row["image"]), "image name")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the captioned image. Raises BadSample."""
        name, file = str(row["image"]), row["file"]
        if file is None:
            missing = (self.root / (self.captions or self.images) / name).with_suffix(CAPTION_SUFFIXES[0])
            raise BadSample("missing-key", f"no caption file {missing.name} or .json", missing)
        image = find_image(self.root / self.images, name)
        turns = (Turn("user", (image,)), Turn("assistant", (self._caption(str(file)),)))
        yield Example(sample, turns, kind="document")

    def files(self) -> Sequence[Path]:
        """Return the caption files."""
        return [self._caption_root / name for name in sorted(self._captions.values())]

    def files_of(self, shard: str) -> Sequence[Path]:
        """Return the caption files of a slice."""
        first = int(shard.removeprefix("rows-"))
        names = (self._captions.get(_stem(name)) for name in self._images[first : first + self.rows_per_shard])
        return [self._caption_root / name for name in names if name is not None]

    @property
    def _caption_root(self) -> Path:
        return self.root / (self.captions or self.images)

    @cached_property
    def _images(self) -> list[str]:
        return sorted(name for name in walk(self.root / self.images) if Path(name).suffix.lower() in IMAGE_SUFFIXES)

    @cached_property
    def _captions(self) -> dict[str, str]:
        """Stem -> caption file; a text file wins over JSON."""
        names = [name for name in walk(self._caption_root) if name.endswith(CAPTION_SUFFIXES)]
        return {_stem(name): name for name in sorted(names, key=lambda name: (name.endswith(".txt"), name))}

    def _caption(self, name: str) -> str:
        path = find_image(self._caption_root, name).path  # a regular file inside the folder, as images must be
        assert path is not None
        try:
            with path.open("rb") as file:
                said = file.read(MAX_CAPTION_BYTES + 1).decode(errors="surrogateescape")
        except OSError as problem:
            raise BadSample("missing-key", f"{path.name} cannot be read ({problem.strerror})", path) from None
        if len(said) > MAX_CAPTION_BYTES:
            raise BadSample("bad-json", f"{path.name} is larger than {MAX_CAPTION_BYTES:,} bytes")
        if path.suffix == ".json":
            try:
                return require_text(as_row(json.loads(said)), self.caption_key)
            except (ValueError, RecursionError) as problem:
                raise BadSample("bad-json", f"{path.name}: {problem}") from None
        caption = clean_text(said, path.name)
        if not caption:
            raise BadSample("empty-text", f"{path.name} holds no text")
        return caption


def walk(folder: Path) -> Iterator[str]:
    """Yield the paths of the files below a folder, relative to it; hidden ones and links to folders are skipped."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        yield from (name if below == "." else f"{below}/{name}" for name in names if not name.startswith("."))


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))
