"""Parquet files as sequences of rows, one row group in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpora.base import Malformed
from data_prep.errors import UserError, did_you_mean


class ParquetRows(Sequence[object]):
    """The rows of a Parquet file as dictionaries of ``columns``."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the footer. Raises UserError where it is not Parquet or a column is missing."""
        self._path, self._columns = path, list(columns)
        try:
            footer = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as problem:
            raise UserError(f"{path}: not a Parquet file ({problem}); download it again") from None
        known = footer.schema.to_arrow_schema().names
        for column in columns:
            if column not in known:
                raise UserError(f"{path}: no column '{column}'{did_you_mean(column, known)}; it has {', '.join(known)}")
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._bounds: list[int] = list(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def __iter__(self) -> Iterator[object]:
        return self._read(0, len(self))

    @overload
    def __getitem__(self, number: int) -> object: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[object]: ...
    def __getitem__(self, number: int | slice) -> object:
        """Return a row, or rows; a slice has no step."""
        if isinstance(number, slice):
            start, stop, step = number.indices(len(self))
            assert step == 1, "slices of a Parquet file have no step"
            return list(self._read(start, stop))
        at = range(len(self))[number]
        return next(self._read(at, at + 1))

    def _read(self, start: int, stop: int) -> Iterator[object]:
        for group, (first, end) in enumerate(pairwise(self._bounds)):
            if first < stop and start < end:
                yield from self._read_group(group, max(start, first) - first, min(stop, end) - first)

    def _read_group(self, group: int, start: int, stop: int) -> Iterator[object]:
        try:
            with pq.ParquetFile(self._path) as file:
                table = file.read_row_group(group, columns=self._columns).slice(start, stop - start)
        except (pa.ArrowException, OSError) as problem:
            raise UserError(f"{self._path}: row group {group} is damaged ({problem}); download it again") from None
        for number in range(table.num_rows):
            try:
                yield table.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as problem:
                yield Malformed(str(problem), code="bad-encoding")
