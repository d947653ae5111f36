"""Captioned images in webdataset tars, in the layout img2dataset writes (CC12M, BLIP3-KALE, DataComp, ...)."""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, Self
from urllib.parse import quote

from pydantic import Field

from data_prep.common.errors import UserError, one_line
from data_prep.corpora.base import Corpus, Malformed, as_row
from data_prep.corpora.fields import Pattern, clean_text, matching_files, require_text
from data_prep.example import Example, ImageRef, Reject, Turn
from data_prep.quarantine import BadSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
"""Raised while a damaged tar is read, besides an OSError without an errno."""


class DamagedTarError(Exception):
    """The file is not a tar, or is damaged from some byte on."""


class Member(NamedTuple):
    """A tar member that belongs to a sample, read into memory."""

    key: str
    suffix: str
    data: bytes
    unsafe: str = ""
    """Why it must not be used: a link, a device, or a name that leaves its folder."""


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
                yield self._example(sample, path, members)
            except BadSample as problem:
                raw = b"\n".join(members[suffix].data for suffix in TEXT_SUFFIXES if suffix in members)
                yield Reject(sample, problem.code, problem.detail, raw.decode(errors="replace"), _image(path, members))
            seen.add(key)

    def _example(self, sample: str, tar: Path, members: dict[str, Member]) -> Example:
        clean_text(next(iter(members.values())).key, "key")
        for member in members.values():
            if member.unsafe:
                raise BadSample("unsafe-path", member.unsafe)
        image = _image(tar, members)
        if image is None:
            raise BadSample("missing-image", f"the tar has no member {sample}.{'|'.join(IMAGE_SUFFIXES)}")
        turns = (Turn("user", (image,)), Turn("assistant", (self._caption(members),)))
        return Example(sample, turns, kind="document")

    def _caption(self, members: dict[str, Member]) -> str:
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


def _image(tar: Path, members: dict[str, Member]) -> ImageRef | None:
    found = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if found is None or found.unsafe:
        return None
    return ImageRef(f"{tar.name}/{found.key}.{found.suffix}", path=tar, data=found.data)


def read_image(path: Path, name: str) -> bytes:
    """Return the member ``KEY.SUFFIX`` of a tar. Raises OSError when it cannot be read, KeyError when it is absent."""
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                if info.isreg() and ".".join(_key_and_suffix(info.name)) == name:
                    return _read(tar, info, "", "").data
    except _DAMAGE as problem:
        raise OSError(f"{path}: damaged tar ({one_line(problem)})") from problem
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


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group consecutive members with the same key, as the format requires."""
    key, members = "", dict[str, Member]()
    for member in _members(path):
        if member.key != key or member.suffix in members:
            if members:
                yield key, members
            key, members = member.key, {}
        members[member.suffix] = member
    if members:
        yield key, members


def _members(path: Path) -> Iterator[Member]:
    """Stream the members of samples. Raises DamagedTarError at the first damage."""
    try:
        with _opened(path) as (tar, size):
            for info in tar:
                if not info.offset_data <= tar.offset < size + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
                key, suffix = _key_and_suffix(info.name)
                if not info.isdir() and key and suffix in IMAGE_SUFFIXES + TEXT_SUFFIXES:
                    yield _read(tar, info, key, suffix)
                tar.members.clear()  # type: ignore[attr-defined]  # would grow with the tar
            _check_end(tar)
    except (OSError, *_DAMAGE) as problem:
        if isinstance(problem, OSError) and problem.errno:  # from the file system, not about the file's content
            raise UserError(f"{path}: cannot be read ({one_line(problem)})") from None
        raise DamagedTarError(f"{path}: {one_line(problem)}; download it again, then run the same command") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, float]]:
    """Open a tar for one pass; yield it with its size in bytes, or infinity when it is compressed.

    An uncompressed tar is read with seeks, which is faster than streaming.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_File(path))
        try:
            tar, size = stack.enter_context(tarfile.open(fileobj=file, mode="r:", tarinfo=_Info)), float(file.size)
        except tarfile.ReadError:
            file.seek(0)
            tar, size = stack.enter_context(tarfile.open(fileobj=file, mode="r|*", tarinfo=_Info)), math.inf
        yield tar, size


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError when anything but zeros follows the end of a tar: a hole, or a second tar."""
    assert tar.fileobj is not None
    while block := tar.fileobj.read(1 << 16):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"more data after its end at byte {tar.offset:,}")


class _Info(tarfile.TarInfo):
    """A member with a strictly checked header: ``tarfile`` itself takes a damaged header for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:  # type: ignore[override]  # it is only called by position
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as problem:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{problem} at byte {tar.offset:,}") from None


class _File(io.BufferedReader):
    """A file whose reads never ask for more memory than the file is large, whatever size a damaged header claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, max(0, self.size - self.tell())))


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split ``folder/000001.seg.JPG`` into ``folder/000001`` and ``seg.jpg``."""
    key, _, suffix = name.rpartition("/")[2].partition(".")
    return str(PurePosixPath(name).parent / key) if key and "/" in name else key, suffix.lower()


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo, key: str, suffix: str) -> Member:
    name = info.name
    if name.startswith("/") or ".." in name.split("/"):
        return Member(key, suffix, b"", f"member name {name!r} leaves its folder")
    file = tar.extractfile(info) if info.isreg() else None
    if file is None:
        return Member(key, suffix, b"", f"member {name!r} is a link or a device, not a regular file")
    return Member(key, suffix, file.read())
