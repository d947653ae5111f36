"""Values from untrusted rows: each helper returns a valid value or raises BadSample with a reason code."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import AfterValidator

from data_prep.common.errors import UserError
from data_prep.corpora.base import Row, as_row
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample


def require(row: Row, key: str, *kinds: type) -> Any:
    """Return ``row[key]``, which must be of one of ``kinds`` (a bool does not count as a number)."""
    value = row.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = f"is {type(value).__name__}" if key in row else "is missing"
        raise BadSample("missing-key", f"key '{key}' {found}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def require_id(row: Row, key: str) -> str:
    """Return an id, which may be a number or text. Raises BadSample: missing-key, bad-encoding."""
    return clean_text(str(require(row, key, str, int)), key)


def single_member(row: Row) -> tuple[str, Row]:
    """Return the key and the value of a row ``{key: object}``. Raises BadSample: missing-key, bad-encoding."""
    [(key, value)] = row.items()
    return clean_text(key, "key"), as_row(value)


def require_text(row: Row, key: str, empty: str = "empty-text") -> str:
    """Return ``row[key]``, stripped. Raises BadSample: missing-key, bad-encoding, or ``empty`` for blank text."""
    value = clean_text(require(row, key, str), key)
    if not value:
        raise BadSample(empty, f"'{key}' is blank")
    return value


def clean_text(value: str, what: str) -> str:
    """Return text without surrounding white space. Raises BadSample: bad-encoding for NUL and lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        # Files are read with "surrogateescape", so bytes that are not UTF-8 arrive here as lone surrogates.
        raise BadSample("bad-encoding", f"'{what}' is not UTF-8 at character {problem.start}") from None
    if "\0" in value:
        raise BadSample("bad-encoding", f"'{what}' contains a NUL character")
    return value.strip()


def _below_root(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a glob pattern relative to the recipe's root, without '..'")
    if any("**" in part and part != "**" for part in path.parts):
        raise ValueError("** must be a whole path component, as in **/*.jsonl")
    return pattern


Pattern: TypeAlias = Annotated[str, AfterValidator(_below_root)]
"""An option that names raw files by a glob pattern, relative to the corpus root."""


def matching_files(root: Path, option: str, pattern: str) -> list[Path]:
    """Return the files under ``root`` that match a pattern, sorted by path. Raises UserError when none does."""
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    if not paths:
        fix = "" if root.is_dir() else ": this folder does not exist; set the recipe's root"
        raise UserError(f"{option}='{pattern}' matches no file under {root}{fix}")
    return paths


def find_image(folder: Path, name: str) -> ImageRef:
    """Return the image ``name`` under ``folder``.

    Raises:
        BadSample: unsafe-path when the name is absolute, contains '..', or is a link out of the folder; missing-image
            when the file does not exist.
    """
    relative = PurePosixPath(clean_text(name, "image name").replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise BadSample("unsafe-path", f"image name {name!r} leaves the image folder")
    path = folder / relative
    try:
        found = path.is_file()
    except OSError as problem:  # a name longer than the file system allows, a folder without permission
        raise BadSample("missing-image", str(problem.strerror), path) from None
    if not found:
        raise BadSample("missing-image", f"no file {relative} in the image folder", path)
    if not path.resolve().is_relative_to(_resolved(folder.absolute())):
        raise BadSample("unsafe-path", f"{relative} links to a file outside the image folder")
    return ImageRef(name=str(relative), path=path)


def image_of(value: object, name: str, folder: Path) -> ImageRef:
    """Return the image of a cell: encoded bytes, ``{bytes, path}`` as ``datasets`` writes it, or a file name.

    Raises:
        BadSample: missing-image for any other value, for a URL, and for a missing file; unsafe-path as `find_image`.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(data, bytes):
        return ImageRef(name, data=data)
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        raise BadSample("missing-image", f"image {name} has neither bytes nor a file name")
    if scheme := _URL.match(path):
        raise BadSample("missing-image", f"image {name} is a {scheme[1]}: URL; download it and give its file name")
    return find_image(folder, path)


_URL = re.compile(r"(https?|ftp|s3|gs|data):", re.IGNORECASE)


@functools.lru_cache(maxsize=16)
def _resolved(folder: Path) -> Path:
    """Resolve an image folder once. The folder itself may be reached through links; its images may not leave it."""
    return folder.resolve()


MAX_PX = 1e9  # larger numbers are no pixels: infinity, NaN, integers too large for a float


class Box(NamedTuple):
    """A box in fractions of the image's width and height: upper-left and lower-right corner."""

    left: float
    top: float
    right: float
    bottom: float

    def __str__(self) -> str:
        """Write the box as AKI does: ``<bbox>[x1, y1][x2, y2]</bbox>`` with three decimals."""
        return f"<bbox>[{self.left:.3f}, {self.top:.3f}][{self.right:.3f}, {self.bottom:.3f}]</bbox>"


def normalised_box(xywh: Sequence[object], width: float, height: float) -> Box:
    """Return a pixel box ``[x, y, w, h]`` as fractions with three decimals, clipped to the image.

    Raises:
        BadSample: bad-box when it is not four finite numbers, or is empty after clipping.
    """
    numbers = [value for value in xywh if isinstance(value, int | float) and abs(value) <= MAX_PX]
    if len(numbers) != 4 or len(xywh) != 4 or not (0 < width <= MAX_PX and 0 < height <= MAX_PX):
        raise BadSample("bad-box", f"box {list(xywh)} in an image of {width} x {height} px")
    x, y, w, h = numbers
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    box = Box(*(round(min(max(corner, 0.0), 1.0), 3) for corner in corners))
    if not (box.left < box.right and box.top < box.bottom):
        raise BadSample("bad-box", f"box {list(xywh)} is empty in an image of {width} x {height} px")
    return box


def question_example(
    sample: str, images: Sequence[ImageRef], question: str, answer: str, *, family: str = "", **meta: str
) -> Example:
    """Return an example of one exchange: images and a question given, an answer generated."""
    turns = (Turn("user", (*images, question)), Turn("assistant", (answer,)))
    return Example(sample, turns, family=family, meta=meta)


def placeholder(*names: str) -> AfterValidator:
    """Return a validator for prompt options: the text must contain each ``{name}`` exactly once."""

    def check(template: str) -> str:
        for name in names:
            if template.count(f"{{{name}}}") != 1:
                raise ValueError(f"must contain {{{name}}} exactly once")
        return template

    return AfterValidator(check)


def fill(template: str, **values: str) -> str:
    """Return a prompt with each ``{name}`` replaced by its value; braces inside the values stay as they are."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], template)
