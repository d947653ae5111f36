"""Captions in Parquet or JSON-lines files, their images in a folder: KALE, and img2dataset's ``files`` layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from data_prep.corpora.base import RawFolder, Row
from data_prep.corpora.downloads import by_key, find_first, hashed, last_part
from data_prep.corpora.fields import clean, key_text, require, text
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.tables import Chain
from data_prep.example import Example, Turn


class Captions(FileCorpus):
    """``{url, caption, ...}`` a row; the caption is generated.

    The number of a row is its id, so that two files with equal keys cannot meet and nothing has to remember them.
    """

    caption_key: str = "caption"
    """Column of the caption (KALE has ``caption`` and ``cogvlm_caption`` too)."""
    images: RawFolder = Path("images")
    """Folder of the image files."""
    names: Literal["name", "sha256", "img2dataset", "path"] = "name"
    """How ``image_key`` names a file: by the last part of the address (``name``), by the address's hex SHA-256
    (``sha256``), by img2dataset's key (``00012/000120034.jpg``; rows that were not downloaded are passed over), or as
    the path itself (``path``)."""
    image_key: str | None = None
    """Column that names the image; without it ``url``, ``key`` for img2dataset, ``path`` for paths."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; captions are read when needed."""
        columns = [self.caption_key, self._image_key, *(["status"] if self.names == "img2dataset" else [])]
        return Chain([self.table(path, columns) for path in self.files()])

    def rows_with_ids(self) -> Iterable[object]:
        """Return nothing: rows have no ids."""
        return ()

    def row_id(self, row: Row) -> str:
        """Return nothing: the number of the row is its id."""
        return ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the captioned image."""
        if self.names == "img2dataset" and require(row, "status", str) != "success":
            return
        image = find_first(self.root / self.images, self._names(row))
        turns = (Turn("user", (image,)), Turn("assistant", (text(row, self.caption_key),)))
        yield Example(sample, turns, kind="document")

    @property
    def _image_key(self) -> str:
        return self.image_key or {"img2dataset": "key", "path": "path"}.get(self.names, "url")

    def _names(self, row: Row) -> list[str]:
        if self.names == "img2dataset":
            return by_key(key_text(row, self._image_key))
        value = clean(require(row, self._image_key, str), self._image_key)
        return [value] if self.names == "path" else hashed(value) if self.names == "sha256" else last_part(value)
