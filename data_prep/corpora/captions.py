"""Captions in data files, with images in a folder or in the rows: KALE, img2dataset's ``files`` layout, your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from data_prep.corpora.base import Input, RawFolder, Row
from data_prep.corpora.downloads import find_first_image, img2dataset_names, sha256_names, url_file_name
from data_prep.corpora.fields import clean_text, image_of, require, require_id, require_text
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.tables import Concatenated
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample


class Captions(FileCorpus):
    """Rows ``{url, caption, ...}``; the caption is generated.

    The row number is the id, so equal keys in two files do not clash.
    """

    caption_key: str = "caption"
    """Column of the caption. KALE has both ``caption`` and ``cogvlm_caption``."""
    images: RawFolder = Path("images")
    """Folder of the downloaded image files."""
    names: Literal["name", "sha256", "img2dataset", "path", "bytes"] = "name"
    """How a row's ``image_key`` maps to a file in ``images``. ``name``: the last part of the URL. ``sha256``: the hex
    SHA-256 of the URL plus any image suffix. ``img2dataset``: its key, as ``00012/000120034.jpg``; rows whose status
    is not ``success`` are skipped. ``path``: the column holds the path itself. ``bytes``: the column holds the encoded
    image, as bytes or as the ``{bytes, path}`` of ``datasets``; ``images`` is not used."""
    image_key: str | None = None
    """Column of the image; default: ``key`` for img2dataset, ``path`` for path, ``image`` for bytes, else ``url``."""

    def inputs(self) -> dict[str, tuple[Input, Path]]:
        """Return the path options that are set; rows with image bytes need no image folder."""
        return {} if self.names == "bytes" else super().inputs()

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
        turns = (Turn("user", (self._image(row, sample),)), Turn("assistant", (require_text(row, self.caption_key),)))
        yield Example(sample, turns, kind="document")

    @property
    def _image_key(self) -> str:
        return self.image_key or {"img2dataset": "key", "path": "path", "bytes": "image"}.get(self.names, "url")

    def _image(self, row: Row, sample: str) -> ImageRef:
        if self.names != "bytes":
            return find_first_image(self.root / self.images, self._names(row))
        image = image_of(row.get(self._image_key), sample, self.root)
        if image.data is None:
            raise BadSample("missing-image", f"'{self._image_key}' holds no image bytes; names: path reads files")
        return image

    def _names(self, row: Row) -> list[str]:
        if self.names == "img2dataset":
            return img2dataset_names(require_id(row, self._image_key))
        value = clean_text(require(row, self._image_key, str), self._image_key)
        if self.names == "path":
            return [value]
        return sha256_names(value) if self.names == "sha256" else url_file_name(value)
