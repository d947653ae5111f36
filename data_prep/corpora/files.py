"""Corpora in data files that a glob pattern names: Parquet, JSON lines, and what else a reader knows."""

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
    """A corpus whose rows lie in the files that ``data`` matches, in the order of their names."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".parquet")
    """Formats that are read."""
    data: Pattern
    """The data files, as a glob pattern; its suffix says their format."""

    @field_validator("data")
    @classmethod
    def _known_suffix(cls, pattern: str) -> str:
        if Path(pattern).suffix not in cls.suffixes:
            raise ValueError(f"must end in {', '.join(cls.suffixes[:-1])} or {cls.suffixes[-1]}")
        return pattern

    def files(self) -> Sequence[Path]:
        """Return the data files by name."""
        return matching_files(self.root, "data", self.data)

    def table(self, path: Path, columns: Sequence[str]) -> Rows:
        """Return the rows of a file; of Parquet, these columns alone."""
        return ParquetRows(path, columns) if path.suffix == ".parquet" else json_lines(path)
