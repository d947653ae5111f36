"""Raw data files as sequences of rows; whole JSON files.

JSON is decoded with ``surrogateescape``: a byte that is not UTF-8 spoils its own row, not the whole file.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from data_prep.common.errors import UserError, one_line


def load_json(path: Path, keep: Collection[str] = ()) -> Any:
    """Return the content of a JSON file; with ``keep``, only these members of every object.

    Other members are dropped while the file is parsed, so they never fill memory. Raises UserError when the file is
    not JSON; the message names the file and the position.
    """

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {key: found[key] for key in keep if key in found}

    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return json.load(file, object_hook=kept if keep else None)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a JSON file ({one_line(problem)}); download it again") from None


def load_list(path: Path, key: str, keep: Collection[str] = ()) -> list[Any]:
    """Return the list under ``key`` of a JSON file's top-level object; with ``keep``, only these members of its rows.

    Raises UserError when there is no such list.
    """
    content = load_json(path, [key, *keep] if keep else ())
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an object with a list under '{key}'; is this the right file?")
    return rows


class Rows(Sequence[object], ABC):
    """Rows of raw data, read on demand one by one or by slice."""

    @abstractmethod
    def read(self, numbers: range) -> Iterator[object]:
        """Yield the rows with these numbers; a row that cannot be parsed is ``Malformed``."""

    def __iter__(self) -> Iterator[object]:
        return self.read(range(len(self)))

    @overload
    def __getitem__(self, number: int) -> object: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[object]: ...
    def __getitem__(self, number: int | slice) -> object:
        """Return one row, or the rows of a slice."""
        chosen = range(len(self))[number]
        return list(self.read(chosen)) if isinstance(chosen, range) else next(self.read(range(chosen, chosen + 1)))


class Concatenated(Rows):
    """Several tables as one; slices have no step."""

    def __init__(self, tables: Sequence[Rows]) -> None:
        self._tables = tables
        self._starts = list(accumulate((len(table) for table in tables), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, numbers: range) -> Iterator[object]:
        """Yield rows, table by table."""
        assert numbers.step == 1, "slices of a chain have no step"
        for table, first in zip(self._tables, self._starts, strict=False):
            inside = range(len(table))[max(0, numbers.start - first) : max(0, numbers.stop - first)]
            if inside:
                yield from table.read(inside)
