"""Parquet and Arrow files as sequences of rows. Parquet is read by row group; Arrow is memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.common.errors import UserError, did_you_mean, one_line
from data_prep.corpora.base import Malformed
from data_prep.corpora.tables import Rows


class ParquetRows(Rows):
    """The rows of a Parquet file as dictionaries of ``columns``; slices have no step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the footer. Raises UserError when the file is not Parquet or a column is missing."""
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

    def read(self, numbers: range) -> Iterator[object]:
        """Yield rows, row group by row group."""
        assert numbers.step == 1, "slices of a Parquet file have no step"
        for group, (first, end) in enumerate(pairwise(self._bounds)):
            start, stop = max(numbers.start, first), min(numbers.stop, end)
            if start < stop:
                yield from self._read_group(group, start - first, stop - first)

    def _read_group(self, group: int, start: int, stop: int) -> Iterator[object]:
        try:
            with pq.ParquetFile(self._path) as file:
                table = file.read_row_group(group, columns=self._columns)
        except (pa.ArrowException, OSError) as problem:
            raise UserError(
                f"{self._path}: row group {group} is damaged ({one_line(problem)}); download it again"
            ) from None
        yield from _rows(table, range(start, stop))


class ArrowRows(Rows):
    """The rows of an Arrow file of ``datasets.save_to_disk``, as dictionaries of ``columns``."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Map the file. Raises UserError when the file is not Arrow or a column is missing."""
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as problem:
            raise UserError(
                f"{path}: not an Arrow file of datasets.save_to_disk ({one_line(problem)}); save it again"
            ) from None
        _require_columns(path, columns, table.column_names)
        self._table = table.select(list(columns))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, numbers: range) -> Iterator[object]:
        """Yield rows; the file stays mapped."""
        return _rows(self._table, numbers)


def column_names(path: Path) -> list[str]:
    """Return the columns of a Parquet or Arrow file. Raises UserError when it is neither."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        return list(pa.ipc.open_stream(pa.memory_map(str(path))).schema.names)
    except (pa.ArrowException, OSError) as problem:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise UserError(f"{path}: not {kind} file ({one_line(problem)}); download it again") from None


def _rows(table: pa.Table, numbers: range) -> Iterator[object]:
    for number in numbers:
        try:
            yield table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as problem:
            yield Malformed(str(problem), code="bad-encoding")


def _require_columns(path: Path, columns: Sequence[str], known: Sequence[str]) -> None:
    for column in columns:
        if column not in known:
            raise UserError(f"{path}: no column '{column}'{did_you_mean(column, known)}; it has {', '.join(known)}")
