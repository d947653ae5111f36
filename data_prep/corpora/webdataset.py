"""Captioned images in webdataset tars, in the layout img2dataset writes (CC12M, BLIP3-KALE, DataComp, ...)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from data_prep.common.errors import UserError
from data_prep.corpora.base import Corpus, Malformed, as_row
from data_prep.corpora.fields import Pattern, clean_text, matching_files, require_text
from data_prep.corpora.tars import DamagedTarError, TarFile, read_members
from data_prep.example import MAX_IMAGE_BYTES, Example, ImageRef, Reject, Turn
from data_prep.quarantine import BadSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
MAX_TEXT_BYTES = 1 << 24
"""Largest text member, 16 MiB."""
LIMITS = dict.fromkeys(IMAGE_SUFFIXES, MAX_IMAGE_BYTES) | dict.fromkeys(TEXT_SUFFIXES, MAX_TEXT_BYTES)


class WebDataset(Corpus):
    """Tars of ``KEY.jpg|jpeg|png|webp`` with ``KEY.txt`` and ``KEY.json``; one tar is one shard.

    Tars are streamed and never extracted; only regular files with plain relative names are read. The id is
    ``TAR/KEY``: img2dataset restarts its numbering on every run, so equal keys in two tars are two samples. A key that
    occurs twice in one tar is a duplicate.
    """

    tars: Pattern = "*.tar"
    """Tars to read, as a glob pattern such as ``**/*.tar``."""
    caption_key: str | None = None
    """Key of ``KEY.json`` that holds the caption (KALE: ``cogvlm_caption``); default: the caption is ``KEY.txt``."""
    granularity: Annotated[int, Field(ge=0, le=5)] | None = None
    """For BLIP3-OCR-200M, which stores several captions per image: take the one with this granularity."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its captions are text that is read off the images" if self.granularity is not None else ""

    def shards(self) -> Sequence[str]:
        """Return the tars' relative paths without ``.tar``, escaped to be file names."""
        return list(self._tars)

    def files(self) -> Sequence[Path]:
        """Return the tars, sorted by path."""
        return list(self._tars.values())

    def files_of(self, shard: str) -> Sequence[Path]:
        """Return the shard's tar."""
        return [self._tars[shard]]

    @cached_property
    def _tars(self) -> dict[str, Path]:
        paths = matching_files(self.root, "tars", self.tars)
        return {quote(path.relative_to(self.root).as_posix().removesuffix(".tar"), safe=""): path for path in paths}

    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield the samples of one tar; a damaged tar yields the samples before the damage, then one reject."""
        try:
            yield from self._examples(shard)
        except DamagedTarError as problem:
            yield Reject(f"{shard}/", "damaged-tar", str(problem))

    def _examples(self, shard: str) -> Iterator[Example | Reject]:
        path, seen = self._tars[shard], set()
        for key, members in _samples(path):
            sample = f"{shard}/{key}".encode(errors="backslashreplace").decode()
            try:
                if key in seen:
                    raise BadSample("duplicate-id", f"key {key} occurs twice in {path.name}")
                yield self._example(sample, key, path, members)
            except BadSample as problem:
                raw = b"\n".join(members[suffix].data for suffix in TEXT_SUFFIXES if suffix in members)
                yield Reject(
                    sample, problem.code, problem.detail, raw.decode(errors="replace"), _image(path, key, members)
                )
            seen.add(key)

    def _example(self, sample: str, key: str, tar: Path, members: dict[str, TarFile]) -> Example:
        clean_text(key, "key")
        for member in members.values():
            if member.code:
                raise BadSample(member.code, member.problem)
        image = _image(tar, key, members)
        if image is None:
            raise BadSample("missing-image", f"the tar has no member {sample}.{'|'.join(IMAGE_SUFFIXES)}")
        turns = (Turn("user", (image,)), Turn("assistant", (self._caption(members),)))
        return Example(sample, turns, kind="document")

    def _caption(self, members: dict[str, TarFile]) -> str:
        if self.caption_key is None and self.granularity is None and "txt" in members:
            caption = clean_text(_decode(members["txt"].data), "txt")
            if not caption:
                raise BadSample("empty-text", "the caption is empty")
            return caption
        if "json" not in members:
            raise BadSample("missing-key", "the sample has no .txt or .json member")
        about = as_row(_parse(_decode(members["json"].data)))
        if self.granularity is not None:
            return _ocr_caption(_parse(require_text(about, self.caption_key or "captions")), self.granularity)
        return require_text(about, self.caption_key or "caption")


def _image(tar: Path, key: str, members: dict[str, TarFile]) -> ImageRef | None:
    for suffix in IMAGE_SUFFIXES:
        if suffix in members and not members[suffix].code:
            return ImageRef(f"{tar.name}/{key}.{suffix}", path=tar, data=members[suffix].data)
    return None


def read_image(path: Path, name: str) -> bytes:
    """Return the member ``KEY.SUFFIX`` of a tar. Raises OSError when it cannot be read, KeyError when it is absent."""
    if not path.is_file():
        raise OSError(f"{path} is not a regular file")
    try:
        for member in read_members(path, LIMITS):
            if ".".join(_key_and_suffix(member.name)) == name and not member.code:
                return member.data
    except (DamagedTarError, UserError) as problem:
        raise OSError(str(problem)) from problem
    raise KeyError(f"{path} has no member {name}")


def _decode(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _parse(content: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as problem:
        return Malformed(str(problem))


def _ocr_caption(captions: object, granularity: int) -> str:
    """Return the OCR text at this granularity, without the web page's own caption."""
    if not isinstance(captions, list):
        raise BadSample(
            "bad-json" if isinstance(captions, Malformed) else "missing-key", "'captions' is not a JSON list"
        )
    for caption in map(as_row, captions):
        if caption.get("granularity") == granularity and not caption.get("include_datacomp_raw_cap"):
            return require_text(caption, "text")
    raise BadSample("missing-key", f"no caption of granularity {granularity}")


def _samples(path: Path) -> Iterator[tuple[str, dict[str, TarFile]]]:
    """Group consecutive members with the same key, as the format requires."""
    key, members = "", dict[str, TarFile]()
    for member in read_members(path, LIMITS):
        own, suffix = _key_and_suffix(member.name)
        if not own:
            continue
        if own != key or suffix in members:
            if members:
                yield key, members
            key, members = own, {}
        members[suffix] = member
    if members:
        yield key, members


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split ``folder/000001.seg.JPG`` into ``folder/000001`` and ``seg.jpg``."""
    key, _, suffix = name.rpartition("/")[2].partition(".")
    return str(PurePosixPath(name).parent / key) if key and "/" in name else key, suffix.lower()
