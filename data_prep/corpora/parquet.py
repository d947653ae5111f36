"""Parquet and Arrow files as sequences of rows. Parquet is read batch by batch; Arrow is memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.common.errors import UserError, did_you_mean, one_line
from data_prep.corpora.base import Malformed
from data_prep.corpora.tables import Rows

BATCH_ROWS = 256
"""Rows of a Parquet file in memory at a time; images make rows large."""
MAX_ROWS_PER_BYTE = 64
"""No real file holds more rows per byte; a damaged or hostile footer may claim any number."""
_UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, NotImplementedError, KeyError)
"""Raised by pyarrow for damaged files and for values without a Python equivalent."""


class ParquetRows(Rows):
    """The rows of a Parquet file as dictionaries of ``columns``; slices have no step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the footer. Raises UserError when the file is not Parquet or a column is missing."""
        self._path, self._columns = path, list(columns)
        try:
            footer = pq.read_metadata(path)
            known = footer.schema.to_arrow_schema().names
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        except _UNREADABLE as problem:
            raise UserError(f"{path}: not a Parquet file ({one_line(problem)}); download it again") from None
        _require_columns(path, columns, known)
        _check_count(path, sizes)
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
        first = 0
        for batch in self._batches(group):
            inside = range(batch.num_rows)[max(0, start - first) : max(0, stop - first)]
            yield from _rows(batch, inside)
            first += batch.num_rows
            if first >= stop:
                return
        raise UserError(f"{self._path}: row group {group} has fewer rows than the footer says; download it again")

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self._path) as file:
                yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._columns)
        except _UNREADABLE as problem:
            raise UserError(
                f"{self._path}: row group {group} is damaged ({one_line(problem)}); download it again"
            ) from None


class ArrowRows(Rows):
    """The rows of an Arrow file of ``datasets.save_to_disk``, as dictionaries of ``columns``.

    A record batch that is damaged is rejected as a whole: its offsets may point anywhere.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Map the file. Raises UserError when the file is not Arrow or a column is missing."""
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            known, batches = reader.schema.names, list(reader)
        except _UNREADABLE as problem:
            raise UserError(
                f"{path}: not an Arrow file of datasets.save_to_disk ({one_line(problem)}); save it again"
            ) from None
        _require_columns(path, columns, known)
        _check_count(path, [batch.num_rows for batch in batches])
        self._batches = [batch.select(list(columns)) for batch in batches]
        self._starts: list[int] = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self._problems: dict[int, str] = {}
        """Batch -> what is wrong with it, or ""; checked on first use."""

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, numbers: range) -> Iterator[object]:
        """Yield rows; the file stays mapped."""
        for number in numbers:
            which = bisect_right(self._starts, number) - 1
            if which not in self._problems:
                self._problems[which] = _problem(self._batches[which])
            if problem := self._problems[which]:
                yield Malformed(f"record batch {which} is damaged ({problem})", code="bad-row")
            else:
                yield from _rows(self._batches[which], (number - self._starts[which],))


def column_names(path: Path) -> list[str]:
    """Return the columns of a Parquet or Arrow file. Raises UserError when it is neither."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        return list(pa.ipc.open_stream(pa.memory_map(str(path))).schema.names)
    except _UNREADABLE as problem:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise UserError(f"{path}: not {kind} file ({one_line(problem)}); download it again") from None


def _rows(batch: pa.RecordBatch, numbers: Iterable[int]) -> Iterator[object]:
    for number in numbers:
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as problem:
            yield Malformed(str(problem), code="bad-encoding")
        except _UNREADABLE as problem:  # a duration in ns, a date beyond year 9999, ...
            yield Malformed(one_line(problem), code="bad-row")


def _problem(batch: pa.RecordBatch) -> str:
    try:
        batch.validate(full=True)
    except _UNREADABLE as problem:
        return one_line(problem) or type(problem).__name__
    return ""


def _check_count(path: Path, sizes: Sequence[int]) -> None:
    size = path.stat().st_size
    if any(rows < 0 for rows in sizes) or sum(sizes) > MAX_ROWS_PER_BYTE * size:
        raise UserError(f"{path}: claims {sum(sizes):,} rows in {size:,} bytes; download it again")


def _require_columns(path: Path, columns: Sequence[str], known: Sequence[str]) -> None:
    for column in columns:
        if column not in known:
            raise UserError(f"{path}: no column '{column}'{did_you_mean(column, known)}; it has {', '.join(known)}")
        if known.count(column) > 1:
            raise UserError(f"{path}: column '{column}' occurs {known.count(column)} times; rename the others")
