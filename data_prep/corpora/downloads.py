"""Images that were downloaded from addresses into a folder: which file belongs to which address."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data_prep.corpora.fields import find_image
from data_prep.example import ImageRef
from data_prep.quarantine import BadSample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")
"""Tried in this order where a name has none."""


def last_part(address: str) -> list[str]:
    """Return the file name that an address ends with; what is no address is a file name already."""
    if "://" not in address:
        return [address]
    return [unquote(PurePosixPath(urlsplit(address).path).name) or "unnamed"]


def hashed(address: str) -> list[str]:
    """Return the hex SHA-256 of an address, with every suffix."""
    digest = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()
    return [digest + suffix for suffix in SUFFIXES]


def by_key(key: str) -> list[str]:
    """Return where img2dataset's ``files`` layout puts a key: ``00012/000120034.jpg``, with every suffix."""
    return [f"{key[:-4]}/{key}{suffix}" for suffix in SUFFIXES]


def find_first(folder: Path, names: Sequence[str]) -> ImageRef:
    """Return the image of the first name that there is. Raises BadSample: missing-image, unsafe-path."""
    for name in names:
        try:
            return find_image(folder, name)
        except BadSample as problem:
            if problem.code != "missing-image":
                raise
    raise BadSample("missing-image", f"no file {names[0]} in the image folder", folder / names[0])
