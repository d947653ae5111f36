"""Official benchmark files as rows: TSV with base64 images, Parquet with image bytes, JSON beside image folders."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, one_line, short_repr
from data_prep.corpora.base import Malformed
from data_prep.corpora.fields import find_image
from data_prep.corpora.json_files import json_lines
from data_prep.corpora.parquet import ParquetRows, column_names
from data_prep.corpora.tables import load_json
from data_prep.example import ImageRef
from data_prep.quarantine import BadSample
from pipeline.evaluation.benchmark import Question

_MISSING = (None, "", "nan", "NaN")
"""How the official files write an absent value."""


@dataclass(frozen=True)
class Row:
    """One row of a file; every getter raises UserError naming the file, the row and the column."""

    where: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a value that must be present, as text."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value in _MISSING or value != value or not isinstance(value, str | int | float):  # NaN differs from itself
            raise UserError(f"{self.where}: expected text under '{name}', found {short_repr(value)}")
        return str(value)

    def optional(self, name: str) -> str:
        """Return a value as text, or an empty string when it is absent."""
        value = self.values.get(name)
        return "" if value in _MISSING or value != value else str(value)  # NaN differs from itself

    def strings(self, name: str) -> list[str]:
        """Return a list of texts, also one that is written as a Python list in a string (MMMU)."""
        value = self.values.get(name)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                value = None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float) for item in value):
            found = short_repr(self.values.get(name))
            raise UserError(f"{self.where}: expected a list of texts under '{name}', found {found}")
        return [str(item) for item in value]

    def image(self, name: str) -> ImageRef:
        """Return the image in a column: a Parquet image, raw bytes, or base64."""
        value = self.values.get(name)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if isinstance(value, str):
            value = _decoded(value)
        if not isinstance(value, bytes) or not value:
            raise UserError(f"{self.where}: no image bytes under '{name}'; download the file again")
        return ImageRef(f"{self.where}, column {name}", data=value)

    def has_image(self, name: str) -> bool:
        """Return whether a column holds an image."""
        value = self.values.get(name)
        return bool(value.get("bytes") if isinstance(value, Mapping) else value)

    def image_in(self, folder: Path, name: str) -> ImageRef:
        """Return the image file below ``folder`` that a column names; a path outside the folder is refused."""
        return image_file(folder, self.text(name), self.where)


def image_file(folder: Path, name: str, where: str) -> ImageRef:
    """Return an image file below a folder. Raises UserError when it is missing or lies outside the folder."""
    try:
        return find_image(folder, name)
    except BadSample as problem:
        raise UserError(f"{where}: image {name} in {folder}: {problem.detail or problem.code}") from None


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def find(folder: Path, *patterns: str) -> list[Path]:
    """Return the files of the first pattern that matches any, sorted by path. Raises UserError when none does."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    raise UserError(f"{folder}: expected {' or '.join(patterns)} there; see docs/evaluation.md")


def table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a TSV or Parquet file.

    Raises:
        UserError: the file is damaged, or one of ``columns`` is missing.
    """
    return _parquet(path, columns, optional) if path.suffix == ".parquet" else _tsv(path, columns)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    present = column_names(path)
    wanted = [*columns, *(name for name in optional if name in present)]
    for number, values in enumerate(ParquetRows(path, wanted), start=1):
        yield Row(f"{path}: row {number}", _object(values, f"{path}: row {number}"))


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # base64 images
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: no column '{missing[0]}'; it has {', '.join(reader.fieldnames or ())}")
            for number, values in enumerate(reader, start=1):
                if None in values or None in values.values():
                    raise UserError(f"{path}: row {number} has another number of columns; download the file again")
                yield Row(f"{path}: row {number}", values)
    except (UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path}: not a TSV file ({one_line(problem)}); download it again") from None


def lines(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file. Raises UserError for a missing file or a line that is not an object."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; see docs/evaluation.md")
    for number, values in enumerate(json_lines(path), start=1):
        yield Row(f"{path}: line {number}", _object(values, f"{path}: line {number}"))


def document(path: Path) -> Mapping[str, Any]:
    """Return the object of a JSON file. Raises UserError when it is missing, damaged or another type."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; see docs/evaluation.md")
    return _object(load_json(path), str(path))


def as_row(value: object, where: str) -> Row:
    """Return an element of a JSON document as a row. Raises UserError when it is no object."""
    return Row(where, _object(value, where))


def _object(value: object, where: str) -> Mapping[str, Any]:
    if isinstance(value, Malformed):
        raise UserError(f"{where}: cannot be read ({one_line(value.why)}); download the file again")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {short_repr(value)}")
    return value


def python_string(path: Path, name: str) -> str:
    """Return the string that a Python file assigns to ``name``; the file is parsed, never run.

    Benchmarks publish the prompts of their judges in their evaluation scripts. Reading them there keeps every
    character official.

    Raises:
        UserError: the file is missing, is not Python, or assigns no such string.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: put the benchmark's own evaluation script there (docs/evaluation.md)")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a Python file ({one_line(problem)}); download it again") from None
    for node in tree.body:
        named = isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets)
        if named and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):  # type: ignore[attr-defined]
            return node.value.value  # type: ignore[attr-defined,no-any-return]
    raise UserError(f"{path}: assigns no string to '{name}'; is this the benchmark's own evaluation script?")


def letters(count: int) -> list[str]:
    """Return the first option letters: A, B, C, ..."""
    return [chr(ord("A") + number) for number in itertools.islice(range(26), count)]


@functools.lru_cache(maxsize=1 << 16)
def _file_hash(path: Path, modified_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image_hashes(question: Question) -> list[str]:
    """Return the sha256 of the encoded bytes of each image. Raises UserError when a file cannot be read."""
    return [_image_hash(image) for image in question.images]


def _image_hash(image: ImageRef) -> str:
    if image.data is not None:
        return hashlib.sha256(image.data).hexdigest()
    assert image.path is not None
    try:
        return _file_hash(image.path, image.path.stat().st_mtime_ns)
    except OSError as problem:
        raise UserError(f"image {image.path} cannot be read: {problem.strerror}") from None
