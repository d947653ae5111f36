"""Parquet and Arrow files as sequences of rows; of Parquet one row group is in memory at a time, Arrow is mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpora.base import Malformed
from data_prep.errors import UserError, did_you_mean, one_line


class ParquetRows(Sequence[object]):
    """The rows of a Parquet file as dictionaries of ``columns``."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the footer. Raises UserError where it is not Parquet or a column is missing."""
        self._path, self._columns = path, list(columns)
        try:
            footer = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as problem:
            raise UserError(f"{path}: not a Parquet file ({one_line(problem)}); download it again") from None
        _require_columns(path, columns, footer.schema.to_arrow_schema().names)
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
            raise UserError(
                f"{self._path}: row group {group} is damaged ({one_line(problem)}); download it again"
            ) from None
        yield from _rows(table)


class ArrowRows(Sequence[object]):
    """The rows of an Arrow file, as ``datasets.save_to_disk`` writes it, as dictionaries of ``columns``."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Map the file. Raises UserError where it is not Arrow or a column is missing."""
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as problem:
            raise UserError(f"{path}: not an Arrow file of datasets ({one_line(problem)}); write it again") from None
        _require_columns(path, columns, table.column_names)
        self._table = table.select(list(columns))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[object]:
        return _rows(self._table)

    @overload
    def __getitem__(self, number: int) -> object: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[object]: ...
    def __getitem__(self, number: int | slice) -> object:
        """Return a row, or rows; a slice has no step."""
        if isinstance(number, slice):
            start, stop, step = number.indices(len(self))
            assert step == 1, "slices of an Arrow file have no step"
            return list(_rows(self._table.slice(start, max(0, stop - start))))
        at = range(len(self))[number]
        return next(_rows(self._table.slice(at, 1)))


def column_names(path: Path) -> list[str]:
    """Return the columns of a Parquet or Arrow file. Raises UserError where it is neither."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        return list(pa.ipc.open_stream(pa.memory_map(str(path))).schema.names)
    except (pa.ArrowException, OSError) as problem:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise UserError(f"{path}: not {kind} file ({one_line(problem)}); download it again") from None


def _rows(table: pa.Table) -> Iterator[object]:
    for number in range(table.num_rows):
        try:
            yield table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as problem:
            yield Malformed(str(problem), code="bad-encoding")


def _require_columns(path: Path, columns: Sequence[str], known: Sequence[str]) -> None:
    for column in columns:
        if column not in known:
            raise UserError(f"{path}: no column '{column}'{did_you_mean(column, known)}; it has {', '.join(known)}")
