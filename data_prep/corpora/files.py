"""Corpora whose rows lie in data files named by a glob pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from data_prep.corpora.base import RowCorpus
from data_prep.corpora.fields import Pattern, matching_files
from data_prep.corpora.parquet import ParquetRows
from data_prep.corpora.tables import Rows, json_lines


class FileCorpus(RowCorpus):
    """A corpus whose rows lie in the files that match ``data``, in the order of their paths."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".parquet")
    """Supported formats."""
    data: Pattern
    """Data files, as a glob pattern such as ``data/*.jsonl``; the suffix selects the format."""

    @field_validator("data")
    @classmethod
    def _known_suffix(cls, pattern: str) -> str:
        if Path(pattern).suffix not in cls.suffixes:
            raise ValueError(f"must end in {', '.join(cls.suffixes[:-1])} or {cls.suffixes[-1]}")
        return pattern

    def files(self) -> Sequence[Path]:
        """Return the data files, sorted by path."""
        return matching_files(self.root, "data", self.data)

    def table(self, path: Path, columns: Sequence[str]) -> Rows:
        """Return the rows of a file; of a Parquet file, read only these columns."""
        return ParquetRows(path, columns) if path.suffix == ".parquet" else json_lines(path)
