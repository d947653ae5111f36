"""Captions in Parquet or JSON-lines files with images in a folder: KALE, and img2dataset's ``files`` layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from data_prep.corpora.base import RawFolder, Row
from data_prep.corpora.downloads import find_first_image, img2dataset_names, sha256_names, url_file_name
from data_prep.corpora.fields import clean_text, require, require_id, require_text
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.tables import Concatenated
from data_prep.example import Example, Turn


class Captions(FileCorpus):
    """Rows ``{url, caption, ...}``; the caption is generated.

    The row number is the id, so equal keys in two files do not clash.
    """

    caption_key: str = "caption"
    """Column of the caption. KALE has both ``caption`` and ``cogvlm_caption``."""
    images: RawFolder = Path("images")
    """Folder of the downloaded image files."""
    names: Literal["name", "sha256", "img2dataset", "path"] = "name"
    """How a row's ``image_key`` maps to a file in ``images``. ``name``: the last part of the URL. ``sha256``: the hex
    SHA-256 of the URL plus any image suffix. ``img2dataset``: its key, as ``00012/000120034.jpg``; rows whose status
    is not ``success`` are skipped. ``path``: the column holds the path itself."""
    image_key: str | None = None
    """Column that identifies the image; default: ``key`` for img2dataset, ``path`` for path, otherwise ``url``."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; a caption is read when it is needed."""
        columns = [self.caption_key, self._image_key, *(["status"] if self.names == "img2dataset" else [])]
        return Concatenated([self.table(path, columns) for path in self.files()])

    def rows_with_ids(self) -> Iterable[object]:
        """Return no rows: they have no ids to compare."""
        return ()

    def row_id(self, row: Row) -> str:
        """Return "": the row number is the id."""
        return ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the image with its caption."""
        if self.names == "img2dataset" and require(row, "status", str) != "success":
            return
        image = find_first_image(self.root / self.images, self._names(row))
        turns = (Turn("user", (image,)), Turn("assistant", (require_text(row, self.caption_key),)))
        yield Example(sample, turns, kind="document")

    @property
    def _image_key(self) -> str:
        return self.image_key or {"img2dataset": "key", "path": "path"}.get(self.names, "url")

    def _names(self, row: Row) -> list[str]:
        if self.names == "img2dataset":
            return img2dataset_names(require_id(row, self._image_key))
        value = clean_text(require(row, self._image_key, str), self._image_key)
        return (
            [value] if self.names == "path" else sha256_names(value) if self.names == "sha256" else url_file_name(value)
        )
