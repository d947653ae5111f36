"""Corpora whose rows lie in data files named by a glob pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import field_validator

from data_prep.corpora.base import RowCorpus
from data_prep.corpora.fields import Pattern, matching_files
from data_prep.corpora.json_files import json_rows
from data_prep.corpora.parquet import ArrowRows, ParquetRows
from data_prep.corpora.tables import Rows

COLUMNAR = {".parquet": ParquetRows, ".arrow": ArrowRows}
SUFFIXES = (".jsonl", ".json", *COLUMNAR)


class FileCorpus(RowCorpus):
    """A corpus whose rows lie in the files that match ``data``, in the order of their paths."""

    data: Pattern
    """Data files, as a glob pattern such as ``data/*.jsonl``. Formats: ``.jsonl``, ``.json`` (a list, or one object
    after another), ``.parquet``, ``.arrow`` (as ``datasets.save_to_disk`` writes it)."""

    @field_validator("data")
    @classmethod
    def _known_suffix(cls, pattern: str) -> str:
        if Path(pattern).suffix not in SUFFIXES:
            raise ValueError(f"must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        return pattern

    def files(self) -> Sequence[Path]:
        """Return the data files, sorted by path."""
        return matching_files(self.root, "data", self.data)

    def table(self, path: Path, columns: Sequence[str]) -> Rows:
        """Return the rows of a file; of a columnar file, read only these columns."""
        reader = COLUMNAR.get(path.suffix)
        return reader(path, columns) if reader else json_rows(path)
