"""What every corpus reader is: options checked by pydantic, stable shards, and rows that become examples or rejects."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from data_prep.example import Example, Reject
from data_prep.quarantine import BadSample

Row: TypeAlias = Mapping[str, Any]


class Input(Enum):
    """Marks an option that names raw data, relative to the corpus root; it must exist when the corpus is built."""

    FILE = "file"
    FOLDER = "folder"


RawFile: TypeAlias = Annotated[Path, Input.FILE]
RawFolder: TypeAlias = Annotated[Path, Input.FOLDER]


class Corpus(BaseModel, ABC):
    """One raw corpus: its fields are the options a recipe may give.

    Shards are the unit of parallel work. Their names are safe as file names and depend on the raw files alone, never
    on the number of workers. A bad row becomes a ``Reject``; only a file that is bad as a whole raises ``UserError``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    root: Path = Field(exclude=True)
    """Folder that all other paths are relative to."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are (``augment`` is refused); empty where the texts decide."""
        return ""

    @abstractmethod
    def shards(self) -> Sequence[str]:
        """Return the names of the units of work, in order."""

    @abstractmethod
    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield what each raw sample of a shard becomes, in file order."""

    def files(self) -> Sequence[Path]:
        """Return the raw files whose change makes earlier output stale (image folders are not listed)."""
        return [path for kind, path in self.inputs().values() if kind is Input.FILE]

    def files_of(self, shard: str) -> Sequence[Path]:
        """Return the raw files whose change makes the earlier output of one shard stale: all, unless a reader knows."""
        return self.files()

    def inputs(self) -> dict[str, tuple[Input, Path]]:
        """Return the marked path options that are set: option name -> what it must be, and where it is."""
        marked = {}
        for name, info in type(self).model_fields.items():
            kind, value = next((mark for mark in info.metadata if isinstance(mark, Input)), None), getattr(self, name)
            if kind is not None and value is not None:
                marked[name] = kind, self.root / value
        return marked


class Malformed(NamedTuple):
    """Stands in a table for a row that could not be parsed."""

    why: str
    code: str = "bad-json"


def as_row(value: object) -> Row:
    """Return a JSON object. Raises BadSample: the code of a malformed row, missing-key for any other value."""
    if isinstance(value, Malformed):
        raise BadSample(value.code, value.why)
    if not isinstance(value, Mapping):
        raise BadSample("missing-key", f"expected an object with keys, found {type(value).__name__}")
    return value


class RowCorpus(Corpus):
    """A corpus of numbered rows; a shard is a fixed slice of them.

    Subclasses say how the rows are read, how a row is identified, and what a row becomes.
    """

    rows_per_shard: ClassVar[int] = 4096

    @abstractmethod
    def read_rows(self) -> Sequence[object]:
        """Read the raw files; called once per process. Raises UserError where a file is bad as a whole."""

    @abstractmethod
    def row_id(self, row: Row) -> str:
        """Return the row's id, or nothing where the number of the row is to serve. Raises BadSample for a bad one."""

    @abstractmethod
    def read_row(self, row: Row, sample: str) -> Iterable[Example | Reject]:
        """Return what one row becomes; all ids begin with ``sample``. Raises BadSample where the row as a whole is bad.

        A row of another split than the one asked for becomes nothing.
        """

    def shards(self) -> Sequence[str]:
        """Return ``rows-00000000`` and so on, named by the first row of each slice."""
        return [f"rows-{first:08d}" for first in range(0, len(self.rows), self.rows_per_shard)]

    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield what each row of the slice becomes."""
        first = int(shard.removeprefix("rows-"))
        for number, row in enumerate(self.rows[first : first + self.rows_per_shard], first):
            yield from self._row_outcome(number, row)

    def rows_with_ids(self) -> Iterable[object]:
        """Return all rows as far as ``row_id`` looks at them; a reader may leave out what is large."""
        return self.rows

    @cached_property
    def rows(self) -> Sequence[object]:
        """All rows, read on first use and kept for the life of the process."""
        return self.read_rows()

    def _row_outcome(self, number: int, value: object) -> Iterable[Example | Reject]:
        sample = f"row-{number}"
        try:
            row = as_row(value)
            sample = self.row_id(row) or sample
            if number in self._repeats:
                raise BadSample("duplicate-id", f"row {number} repeats an id seen before")
            found = list(self.read_row(row, sample))  # all at once: a bad row leaves nothing behind
        except BadSample as problem:
            found = [Reject(sample, problem.code, problem.detail, sought=problem.sought)]
        return [replace(item, raw=as_text(value)) if isinstance(item, Reject) else item for item in found]

    @cached_property
    def _repeats(self) -> frozenset[int]:
        """Numbers of the rows whose id an earlier row has: known to every shard without talking to the others.

        Ids are compared by a hash of 64 bits, for all of them would fill the memory of every process: of 10 million
        rows one is taken for a repeat in a run out of 370,000.
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
        order = np.argsort(np.asarray(hashes), kind="stable")  # equal ones as they come
        ordered = np.asarray(hashes)[order]
        return frozenset(np.asarray(numbers)[order[1:]][ordered[1:] == ordered[:-1]].tolist())


def as_text(value: object) -> str:
    """Return a raw row in words, for whoever looks at what was rejected."""
    if isinstance(value, Malformed):
        return ""
    return json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")


def attempt(sample: str, make: Callable[[], Example]) -> Example | Reject:
    """Return one of the several examples of a row, or why it alone cannot be used."""
    try:
        return make()
    except BadSample as problem:
        return Reject(sample, problem.code, problem.detail, sought=problem.sought)
