"""Base classes of the corpus readers: validated options, stable shards, and rows that become examples or rejects."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from data_prep.example import Example, Reject
from data_prep.quarantine import BadSample

Row: TypeAlias = Mapping[str, Any]


class Input(Enum):
    """Marks an option that names raw data, relative to the corpus root; it must exist when the reader is built."""

    FILE = "file"
    FOLDER = "folder"


RawFile: TypeAlias = Annotated[Path, Input.FILE]
RawFolder: TypeAlias = Annotated[Path, Input.FOLDER]


class Corpus(BaseModel, ABC):
    """One raw corpus. Its fields are the options a recipe may set; each field's docstring is its documentation.

    Shards are processed in parallel. Their names are valid file names and depend only on the raw files, never on the
    number of workers. A bad row becomes a ``Reject``; ``UserError`` is raised only when a whole file is unusable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, use_attribute_docstrings=True)

    root: Path = Field(exclude=True)
    """Folder that all other paths are relative to; set by the recipe."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused for this corpus; empty where it depends on each sample's text."""
        return ""

    @abstractmethod
    def shards(self) -> Sequence[str]:
        """Return the shard names, in order."""

    @abstractmethod
    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield the outcome of each raw sample of a shard, in file order."""

    def probe(self, count: int) -> Iterator[Example | Reject]:
        """Yield the outcomes of ``count`` samples each at the beginning, in the middle and at the end; cheaply."""
        names = self.shards()
        for name in dict.fromkeys(names[place] for place in _places(len(names), 1)):
            yield from islice(self.examples(name), count)

    def files(self) -> Sequence[Path]:
        """Return the raw files whose change makes earlier output stale (image folders are not listed)."""
        return [path for kind, path in self.inputs().values() if kind is Input.FILE]

    def check_files(self) -> None:
        """Raise UserError if raw files are missing; what has to be downloaded is not."""
        self.files()

    def files_of(self, shard: str) -> Sequence[Path]:
        """Return the raw files that one shard is read from; by default all files of the corpus."""
        return self.files()

    def inputs(self) -> dict[str, tuple[Input, Path]]:
        """Return the path options that are set: option name -> (file or folder, path)."""
        marked = {}
        for name, info in type(self).model_fields.items():
            kind, value = next((mark for mark in info.metadata if isinstance(mark, Input)), None), getattr(self, name)
            if kind is not None and value is not None:
                marked[name] = kind, self.root / value
        return marked


def _places(count: int, size: int) -> list[int]:
    """Return where to look at ``size`` of ``count`` things in the beginning, in the middle and at the end."""
    return [max(0, min(place, count - size)) for place in (0, count // 2, count)] if count else []


class Malformed(NamedTuple):
    """Placeholder in a table for a row that could not be parsed."""

    why: str
    code: str = "bad-json"


def as_row(value: object) -> Row:
    """Return ``value`` as a JSON object. Raises BadSample: the code of a malformed row, else missing-key."""
    if isinstance(value, Malformed):
        raise BadSample(value.code, value.why)
    if not isinstance(value, Mapping):
        raise BadSample("missing-key", f"expected an object with keys, found {type(value).__name__}")
    return value


class RowCorpus(Corpus):
    """A corpus of numbered rows; a shard is a fixed-size slice of them.

    Subclasses define how rows are read, identified and converted.
    """

    rows_per_shard: ClassVar[int] = 4096

    @abstractmethod
    def read_rows(self) -> Sequence[object]:
        """Read the raw files; called once per process. Raises UserError when a whole file is unusable."""

    @abstractmethod
    def row_id(self, row: Row) -> str:
        """Return the row's id, or "" to use the row number. Raises BadSample when the id is bad."""

    @abstractmethod
    def read_row(self, row: Row, sample: str) -> Iterable[Example | Reject]:
        """Return the outcomes of one row; every id starts with ``sample``. Raises BadSample when the row is unusable.

        A row of another split yields nothing.
        """

    def shards(self) -> Sequence[str]:
        """Return ``rows-00000000`` and so on: each slice is named after its first row."""
        return [f"rows-{first:08d}" for first in range(0, len(self.rows), self.rows_per_shard)]

    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield the outcomes of each row of the slice."""
        first = int(shard.removeprefix("rows-"))
        for number, row in enumerate(self.rows[first : first + self.rows_per_shard], first):
            yield from self._row_outcome(number, row)

    def probe(self, count: int) -> Iterator[Example | Reject]:
        """Yield the outcomes of a few rows, without the check for repeated ids, which reads all rows."""
        numbers = {place + n for place in _places(len(self.rows), count) for n in range(count)}
        for number in sorted(number for number in numbers if number < len(self.rows)):
            yield from self._row_outcome(number, self.rows[number], repeats=frozenset())

    def rows_with_ids(self) -> Iterable[object]:
        """Return all rows with at least the columns that ``row_id`` reads; a reader may leave out large ones."""
        return self.rows

    @cached_property
    def rows(self) -> Sequence[object]:
        """All rows, read on first use and kept for the life of the process."""
        return self.read_rows()

    def _row_outcome(
        self, number: int, value: object, name: str = "", repeats: frozenset[int] | None = None
    ) -> Iterable[Example | Reject]:
        sample = name or f"row-{number}"
        try:
            row = as_row(value)
            sample = self.row_id(row) or sample
            if number in (self._repeats if repeats is None else repeats):
                raise BadSample("duplicate-id", f"row {number} repeats an id seen before")
            found = list(self.read_row(row, sample))  # a row that turns out bad half-way yields nothing else
        except BadSample as problem:
            found = [Reject(sample, problem.code, problem.detail, missing_file=problem.missing_file)]
        return [replace(item, raw=as_text(value)) if isinstance(item, Reject) else item for item in found]

    @cached_property
    def _repeats(self) -> frozenset[int]:
        """Numbers of the rows whose id occurs earlier; every process computes them all, so shards need not talk.

        Ids are compared by a 64-bit hash, because the ids themselves would fill the memory of every process. With 10
        million rows, one run in 370,000 takes some row for a duplicate by mistake.
        """
        numbers, hashes = array("q"), array("Q")
        for number, value in enumerate(self.rows_with_ids()):
            try:
                sample = self.row_id(as_row(value))
            except BadSample:
                continue
            if sample:
                numbers.append(number)
                hashes.append(xxhash.xxh3_64_intdigest(sample.encode(errors="surrogatepass")))
        order = np.argsort(np.asarray(hashes), kind="stable")  # equal hashes stay in row order
        ordered = np.asarray(hashes)[order]
        return frozenset(np.asarray(numbers)[order[1:]][ordered[1:] == ordered[:-1]].tolist())


def as_text(value: object) -> str:
    """Return a raw row as text, for the list of rejects."""
    if isinstance(value, Malformed):
        return ""
    return json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")


def example_or_reject(sample: str, make: Callable[[], Example]) -> Example | Reject:
    """Return one of a row's several examples, or a reject of that example alone."""
    try:
        return make()
    except BadSample as problem:
        return Reject(sample, problem.code, problem.detail, missing_file=problem.missing_file)
