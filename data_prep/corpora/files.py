"""Corpora whose rows lie in data files, or in a dataset of the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import model_validator

from data_prep.corpora.base import RowCorpus
from data_prep.corpora.dataset_source import DatasetSource, is_saved, saved_files, stream_name, stream_number
from data_prep.corpora.fields import Pattern, matching_files
from data_prep.corpora.json_files import json_rows
from data_prep.corpora.parquet import ArrowRows, ParquetRows
from data_prep.corpora.tables import Rows
from data_prep.example import Example, Reject

COLUMNAR = {".parquet": ParquetRows, ".arrow": ArrowRows}
SUFFIXES = (".jsonl", ".json", *COLUMNAR)


class FileCorpus(RowCorpus):
    """A corpus whose rows lie in the files that match ``data``, in the order of their paths, or in a ``dataset``."""

    data: Pattern | None = None
    """Data files, as a glob pattern such as ``data/*.jsonl``, or a folder written by ``save_to_disk``. Formats:
    ``.jsonl``, ``.json`` (a list, or one object after another), ``.parquet``, ``.arrow``."""
    dataset: DatasetSource | None = None
    """Instead of ``data``: what ``datasets.load_dataset`` loads, as ``{path, name, split, revision, streaming}``."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.data is None) == (self.dataset is None):
            raise ValueError("set either data or dataset")
        known = ("", *SUFFIXES)  # a folder of save_to_disk usually has no suffix
        if self.data is not None and Path(self.data).suffix not in known and not (self.root / self.data).is_dir():
            raise ValueError(
                f"data must end in {', '.join(SUFFIXES)}, or be a folder written by save_to_disk (found {self.data!r})"
            )
        return self

    def files(self) -> Sequence[Path]:
        """Return the data files, sorted by path; those of a dataset in its order, none if the Hub streams it."""
        if self.dataset is not None:
            streamed = self.dataset.streaming
            return self.dataset.local_files(self.root) if streamed else self.dataset.arrow_files(self.root)
        assert self.data is not None
        folder, suffix = self.root / self.data, Path(self.data).suffix
        saved = not suffix or (folder.is_dir() and (is_saved(folder) or suffix not in SUFFIXES))
        return saved_files(folder) if saved else matching_files(self.root, "data", self.data)

    def check_files(self) -> None:
        """Raise UserError if raw files are missing; datasets of the Hub are loaded by ingest."""
        if self.dataset is None or self.dataset.is_local(self.root):
            self.files()

    def table(self, path: Path, columns: Sequence[str]) -> Rows:
        """Return the rows of a file; of a columnar file, read only these columns."""
        reader = COLUMNAR.get(path.suffix)
        return reader(path, columns) if reader else json_rows(path)

    def shards(self) -> Sequence[str]:
        """Return slices of the rows, or the shards of a streamed dataset."""
        if self.dataset is None or not self.dataset.streaming:
            return super().shards()
        return [stream_name(number) for number in range(self.dataset.stream_shards(self.root))]

    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield the outcomes of each row of a shard."""
        if self.dataset is None or not self.dataset.streaming:
            yield from super().examples(shard)
            return
        for number, row in enumerate(self.dataset.stream(self.root, stream_number(shard))):
            yield from self._row_outcome(number, row, f"{shard}-{number}")
