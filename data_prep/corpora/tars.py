"""Tars read member by member in bounded memory, whatever their headers claim.

``tarfile`` allocates what a header declares and takes a damaged header for the end of the tar. Here a declared size
never allocates, and damage is an error.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from data_prep.common.errors import UserError, one_line

MAX_HEADER_BYTES = 1 << 20
"""Largest extended header (long name, pax)."""
MAX_NAME_CHARACTERS = 4096
MAX_SPARSE_BLOCKS = 1 << 12
"""Most extension blocks in the map of a sparse member."""
_DAMAGE = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError),
    *(RecursionError, MemoryError),  # of chained headers, of an xz dictionary
)
"""Raised while a damaged tar is read, besides an OSError without an errno."""
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]{1,255})=")


class DamagedTarError(Exception):
    """The file is not a tar, or is damaged from some byte on."""


class TarFile(NamedTuple):
    """A member of a tar; ``problem`` and ``code`` say why its data was not read."""

    name: str
    data: bytes = b""
    problem: str = ""
    code: str = ""


def read_members(path: Path, limits: dict[str, int]) -> Iterator[TarFile]:
    """Stream the files of a tar, plain or compressed; nothing is extracted.

    Args:
        path: the tar.
        limits: lower-case suffix (after the first dot of a base name) -> largest size in bytes. Members with another
            suffix, and folders, are skipped.

    Raises:
        DamagedTarError: at the first damage.
        UserError: the file system cannot read the file.
    """
    try:
        with _opened(path) as (tar, size):
            for info in tar:
                if not info.offset_data <= tar.offset < size + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
                if len(info.name) > MAX_NAME_CHARACTERS:
                    raise tarfile.ReadError(f"a name of {len(info.name):,} characters at byte {info.offset:,}")
                limit = limits.get(info.name.rpartition("/")[2].partition(".")[2].lower())
                if limit is not None and not info.isdir():
                    yield _read(tar, info, limit)
                tar.members.clear()  # type: ignore[attr-defined]  # would grow with the tar
            _check_end(tar)
    except (OSError, *_DAMAGE) as problem:
        if isinstance(problem, OSError) and problem.errno:  # from the file system, not about the file's content
            raise UserError(f"{path}: cannot be read ({one_line(problem)})") from None
        why = one_line(problem) or type(problem).__name__
        raise DamagedTarError(f"{path}: {why}; download it again, then run the same command") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, float]]:
    """Open a tar for one pass; yield it with its size in bytes, or infinity when it is compressed."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        start = file.read(max(map(len, _COMPRESSED)))
        file.seek(0)
        for magic, open_compressed in _COMPRESSED.items():
            if start.startswith(magic):  # not tarfile's own streams: these copy what a small read leaves over
                content, size = stack.enter_context(open_compressed(file)), math.inf
                break
        else:
            content, size = file, float(os.fstat(file.fileno()).st_size)
        yield stack.enter_context(tarfile.open(fileobj=content, mode="r:", tarinfo=_Info)), size


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError when anything but zeros follows the end of a tar: a hole, or a second tar."""
    assert tar.fileobj is not None
    while block := tar.fileobj.read(1 << 16):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"more data after its end at byte {tar.offset:,}")


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo, limit: int) -> TarFile:
    name = info.name
    if name.startswith("/") or ".." in name.split("/"):
        return TarFile(name, problem=f"member name {name!r} leaves its folder", code="unsafe-path")
    if not info.isreg() or info.issparse():
        kind = "sparse" if info.issparse() else "a link or a device"
        return TarFile(name, problem=f"member {name!r} is {kind}, not a regular file", code="unsafe-path")
    if info.size > limit:
        return TarFile(
            name, problem=f"member {name!r} has {info.size:,} bytes, the limit is {limit:,}", code="too-large"
        )
    file = tar.extractfile(info)
    assert file is not None, "a regular file has data"
    data = file.read()
    if len(data) != info.size:
        raise tarfile.ReadError("unexpected end of data")
    return TarFile(name, data)


class _Info(tarfile.TarInfo):
    """A member with strictly checked headers of bounded size."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:  # type: ignore[override]  # only called by position
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as problem:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{problem} at byte {tar.offset:,}") from None

    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        if self.type in _HEADERS and not 0 <= self.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes at byte {tar.offset:,}")
        member: Self = super()._proc_member(tar)  # type: ignore[misc]
        return member

    def _proc_sparse(self, tar: tarfile.TarFile) -> Self:
        """Skip the map of a sparse member. It is never read, since its size may be anything."""
        assert tar.fileobj is not None
        _, extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        del self._sparse_structs  # type: ignore[attr-defined]
        for _ in range(MAX_SPARSE_BLOCKS):
            if not extended:
                break
            extended = tar.fileobj.read(tarfile.BLOCKSIZE)[504]
        else:
            raise tarfile.ReadError(f"an endless sparse map at byte {tar.offset:,}")
        self.sparse = b""  # any value makes it a sparse member
        self.offset_data = tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self

    def _proc_pax(self, tar: tarfile.TarFile) -> Self:
        """Read an extended header. ``tarfile`` of Python 3.11 takes time and memory quadratic in a hostile one."""
        assert tar.fileobj is not None
        headers = dict(_pax_records(tar.fileobj.read(self._block(self.size))[: self.size]))  # type: ignore[attr-defined]
        if self.type == tarfile.XGLTYPE:  # for all members that follow
            tar.pax_headers.update({key: headers[key] for key in headers.keys() & set(tarfile.PAX_FIELDS)})  # type: ignore[attr-defined]
        try:
            member = self.fromtarfile(tar)
        except tarfile.HeaderError as problem:
            raise tarfile.ReadError(f"{problem} at byte {tar.offset:,}") from None
        if self.type != tarfile.XGLTYPE:
            member._apply_pax_info(headers, tar.encoding, tar.errors)  # type: ignore[attr-defined]
            member.offset = self.offset
            if "size" in headers:
                has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES  # type: ignore[attr-defined]
                tar.offset = member.offset_data + (member._block(member.size) if has_data else 0)  # type: ignore[attr-defined]
            if any(key.startswith("GNU.sparse.") for key in headers):
                member.sparse = b""
        return member


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the ``LENGTH KEY=VALUE`` records of a pax header, which must follow each other without gaps."""
    at = 0
    while at < len(data) and data[at]:
        record = _PAX_RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a damaged pax header")
        yield record[2].decode(errors="replace"), data[record.end() : end - 1].decode(errors="surrogateescape")
        at = end
