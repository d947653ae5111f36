"""JSON files that other processes or other people wrote, read through a typed model: one clear line for any damage."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from data_prep.common.errors import UserError, one_line
from data_prep.common.validation import first_problem

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")
"""For dataclasses read by ``read_typed``: no unknown keys."""
_MAX_BYTES = 1 << 30


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable() or not path.parts:
        raise ValueError("must be a relative path without '..'")
    return name


Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
"""A number of things; never negative, never a float or text."""
Real = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True, max_length=1 << 12, pattern=r"^[^\x00]*$")]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^([0-9a-f]{64})?$")]
"""A hex sha256, or empty where nothing was hashed."""
InnerPath = Annotated[str, Field(strict=True, max_length=1 << 12), AfterValidator(_inside)]
"""A path inside the folder of the file that holds it."""


def parse_object(data: bytes, where: Path, fix: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError for anything else, however large, deep or odd."""
    try:
        raw = from_json(data, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise UserError(f"{where}: malformed ({one_line(error)}); {fix}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: malformed (a JSON object belongs here, not a {type(raw).__name__}); {fix}")
    return raw


def check_typed(adapter: TypeAdapter[T], raw: object, where: Path, fix: str) -> T:
    """Return a value of the adapter's type. Raises UserError naming the first key that is wrong."""
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise UserError(f"{where}: malformed ({first_problem(error)}); {fix}") from error


def read_bytes(path: Path, fix: str) -> bytes:
    """Read a listing. Raises UserError if it cannot be read or is absurdly large."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {fix}") from error
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: larger than {_MAX_BYTES >> 30} GiB; {fix}")
    return data
