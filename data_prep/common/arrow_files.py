"""Atomic Arrow IPC files: streamed to a temporary file, synced, hashed, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from data_prep.common.files import FileEntry, sha256_file, temporary_beside

BATCH_ROWS = 1024
"""Rows per record batch (the last may hold fewer), so row ``i`` is in batch ``i // BATCH_ROWS``."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` on success, remove it on failure."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class ArrowWriter:
    """Context manager that streams rows to one Arrow IPC file in batches of ``batch_rows``.

    After the block has succeeded, ``entry`` holds the file's size, hash and row count.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, batch_rows: int = BATCH_ROWS) -> None:
        self._path, self._schema, self._batch_rows = path, schema, batch_rows
        self._rows: list[tuple[Any, ...]] = []
        self._written = 0
        self.entry = FileEntry(path.name, 0, "")

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # closes every layer even if closing an inner one fails (disk full)
            self._temporary = stack.enter_context(atomic_path(self._path))
            stack.push(self._describe)
            sink = stack.enter_context(pa.OSFile(str(self._temporary), "wb"))
            self._stream = stack.enter_context(pa.ipc.new_file(sink, self._schema))
            stack.push(self._flush_rest)
            self._stack = stack.pop_all()
        return self

    def append(self, row: tuple[Any, ...]) -> None:
        """Append one row: its values in schema order."""
        self._rows.append(row)
        if len(self._rows) == self._batch_rows:
            self._flush()

    def _flush(self) -> None:
        columns = [
            pa.array(column, type=field.type)
            for column, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._written += len(self._rows)
        self._rows.clear()

    def _flush_rest(self, *failure: object) -> None:
        if failure[0] is None and self._rows:
            self._flush()

    def _describe(self, *failure: object) -> None:
        if failure[0] is None:
            digest = sha256_file(self._temporary)
            self.entry = FileEntry(self._path.name, self._temporary.stat().st_size, digest, self._written)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def open_batches(path: Path) -> list[pa.RecordBatch]:
    """Memory-map an Arrow IPC file and return its record batches. They own the mapping; no file stays open.

    Raises OSError or ArrowInvalid.
    """
    with pa.memory_map(str(path)) as mapped:
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]
