"""Documents of interleaved images and text: OBELICS and Multimodal C4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from data_prep.corpora.base import RawFolder, Row, as_row
from data_prep.corpora.downloads import find_first_image, sha256_names, url_file_name
from data_prep.corpora.fields import clean_text, require, require_id
from data_prep.corpora.files import FileCorpus
from data_prep.corpora.tables import Concatenated
from data_prep.example import Example, ImageRef, Part, Turn
from data_prep.quarantine import BadSample


class Interleaved(FileCorpus):
    """A row is a document: text is generated, images are given.

    ``obelics``: parallel lists ``images`` (URLs or null) and ``texts`` (text or null); exactly one of the two is set
    at each position. ``mmc4``: ``text_list`` (sentences) and ``image_info``
    (``[{image_name, matched_text_index, ...}]``); an image precedes the sentence it matches.

    Web images vanish. With ``missing: drop``, an image that is missing or broken is left out of its document and
    counted (``image-dropped``); a document that loses all its images is rejected. Images after the last text teach
    nothing and are dropped. A document longer than a row becomes several samples; it is split before images, and no
    sample holds more than ``max_images`` of its pack set.
    """

    format: Literal["obelics", "mmc4"] = "obelics"
    """Layout of the rows: ``obelics`` or ``mmc4``."""
    images: RawFolder = Path("images")
    """Folder of the downloaded image files."""
    names: Literal["name", "sha256"] = "name"
    """How a URL maps to a file in ``images``. ``name``: the last part of the URL (URLs with the same last part share a
    file). ``sha256``: the hex SHA-256 of the whole URL plus any image suffix."""
    path_column: str | None = None
    """OBELICS: column with a list of file paths, parallel to ``images``; use it when the downloader renamed files."""
    id_column: str | None = None
    """Column of the ids; default: the row number is the id."""
    missing: Literal["drop", "reject"] = "drop"
    """What to do about a missing or broken image: ``drop`` the image, or ``reject`` the whole document."""

    def read_rows(self) -> Sequence[object]:
        """Index the files; a document is parsed when it is needed."""
        keys = ("images", "texts", self.path_column) if self.format == "obelics" else ("text_list", "image_info")
        return self._tables([*keys, self.id_column])

    def rows_with_ids(self) -> Iterable[object]:
        """Return only the id column."""
        return self._tables([self.id_column]) if self.id_column else ()

    def _tables(self, columns: Sequence[str | None]) -> Concatenated:
        wanted = [column for column in columns if column is not None]
        return Concatenated([self.table(path, wanted) for path in self.files()])

    def row_id(self, row: Row) -> str:
        """Return the id, if ``id_column`` is set."""
        return require_id(row, self.id_column) if self.id_column else ""

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the document."""
        joint = "\n\n" if self.format == "obelics" else " "
        turns = list[Turn]()
        for shows, group in groupby(self._parts(row), key=lambda part: isinstance(part, ImageRef)):
            parts = tuple(group)
            said = joint.join(part for part in parts if isinstance(part, str))
            turns.append(Turn("user", parts) if shows else Turn("assistant", (said,)))
        if turns and turns[-1].role == "user":
            turns.pop()
        if not turns:
            raise BadSample("empty-text", "the document has no text")
        if len(turns) == 1:
            raise BadSample("missing-image", "the document has no image before a text")
        yield Example(sample, tuple(turns), kind="document")

    def _parts(self, row: Row) -> Iterator[Part]:
        return self._obelics(row) if self.format == "obelics" else self._mmc4(row)

    def _obelics(self, row: Row) -> Iterator[Part]:
        images, texts = require(row, "images", list), require(row, "texts", list)
        files = require(row, self.path_column, list) if self.path_column else images
        if not len(images) == len(texts) == len(files):
            raise BadSample("missing-key", f"{len(images)} images, {len(texts)} texts: the lists must be parallel")
        for place, (image, text, file) in enumerate(zip(images, texts, files, strict=True)):
            if (image is None) == (text is None):
                raise BadSample("missing-key", f"position {place} must hold either an image or a text")
            if image is not None:
                yield self._image(file if self.path_column else image)
            elif said := clean_text(_string(text, "texts"), "texts"):
                yield said

    def _mmc4(self, row: Row) -> Iterator[Part]:
        sentences = require(row, "text_list", list)
        before: dict[int, list[ImageRef]] = {}
        for about in map(as_row, require(row, "image_info", list)):
            place = require(about, "matched_text_index", int)
            if not 0 <= place < len(sentences):
                raise BadSample("bad-label", f"matched_text_index is {place}, but there are {len(sentences)} sentences")
            before.setdefault(place, []).append(self._image(require(about, "image_name", str)))
        for place, sentence in enumerate(sentences):
            yield from before.get(place, ())
            if said := clean_text(_string(sentence, "text_list"), "text_list"):
                yield said

    def _image(self, address: object) -> ImageRef:
        """Return an image; a missing one is returned as well, so that ingest can drop and count it."""
        value = _string(address, "images")
        names = sha256_names(value) if self.names == "sha256" else [value] if self.path_column else url_file_name(value)
        try:
            return replace(find_first_image(self.root / self.images, names), optional=self.missing == "drop")
        except BadSample as problem:
            if problem.code != "missing-image" or self.missing == "reject":
                raise
        return ImageRef(names[0], path=self.root / self.images / names[0], optional=True)


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadSample("missing-key", f"'{key}' holds {type(value).__name__}, expected text")
    return value
