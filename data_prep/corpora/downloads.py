"""Downloaded images: which file in a folder belongs to which URL."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data_prep.corpora.fields import find_image
from data_prep.example import ImageRef
from data_prep.quarantine import BadSample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")
"""Suffixes to try, in this order, for a name without one."""


def url_file_name(address: str) -> list[str]:
    """Return the last part of a URL as a file name; anything else is taken as a file name."""
    if "://" not in address:
        return [address]
    return [unquote(PurePosixPath(urlsplit(address).path).name) or "unnamed"]


def sha256_names(address: str) -> list[str]:
    """Return the candidate names of a file named by the hex SHA-256 of its URL."""
    digest = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()
    return [digest + suffix for suffix in SUFFIXES]


def img2dataset_names(key: str) -> list[str]:
    """Return the candidate names of a key in img2dataset's ``files`` layout: ``00012/000120034.jpg``, ..."""
    return [f"{key[:-4]}/{key}{suffix}" for suffix in SUFFIXES]


def find_first_image(folder: Path, names: Sequence[str]) -> ImageRef:
    """Return the first image of ``names`` that exists. Raises BadSample: missing-image, unsafe-path."""
    for name in names:
        try:
            return find_image(folder, name)
        except BadSample as problem:
            if problem.code != "missing-image":
                raise
    raise BadSample("missing-image", f"no file {names[0]} in the image folder", folder / names[0])
