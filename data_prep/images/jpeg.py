"""Decides from the structure of a JPEG whether it decodes, without computing pixels.

libjpeg fails on invalid headers and tables and on data that end early. It turns any bits inside a scan into pixels,
with warnings that Pillow drops. So a file decodes if its segments, tables and scans follow the standard (ITU-T T.81) up
to the end marker. ``surely_decodes`` returns True only for such files; any other file has to be decoded to find out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

_START, _END = b"\xff\xd8", b"\xff\xd9"
_HUFFMAN, _QUANTIZATION, _SCAN, _RESTART = b"\xff\xc4", b"\xff\xdb", b"\xff\xda", b"\xff\xdd"
_SEQUENTIAL, _PROGRESSIVE = (b"\xff\xc0", b"\xff\xc1"), b"\xff\xc2"
_SKIPPED = {bytes((0xFF, marker)) for marker in (*range(0xE0, 0xF0), 0xFE)}
"""Application segments and comments."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""Marker that ends the data of a scan: neither a stuffed byte nor a restart."""
_MAX_SIDE, _MAX_BLOCKS, _MAX_SHIFT = 65_500, 10, 13
"""Limits of libjpeg: side length, blocks of an interleaved MCU, bits a progressive scan leaves to later scans."""
_MAX_DIFFERENCE, _MAX_AREA = 11, 1 << 26
"""Maximum bits of the difference of DC coefficients (T.81, table F.1) and maximum pixels of a frame. With so few
blocks, no coefficient of a progressive scan exceeds 32 bits, which libjpeg would refuse.
"""


class _OtherError(Exception):
    """The structure is unusual; only decoding can tell."""


def surely_decodes(data: bytes) -> bool:
    """Return True if Pillow is certain to decode the first frame of a JPEG; False if only decoding can tell."""
    try:
        _read(data)
    except (_OtherError, IndexError):
        return False
    return True


@dataclass(slots=True)
class _Component:
    blocks: int
    """Blocks in an interleaved MCU."""
    quantization: int
    begun: bool = False
    """Whether a scan has contained its DC coefficient."""


@dataclass(slots=True)
class _State:
    """State of a decoder while it reads a file."""

    components: dict[int, _Component] = field(default_factory=dict)
    progressive: bool = False
    scans: int = 0
    quantization: set[int] = field(default_factory=set)
    huffman: set[int] = field(default_factory=set)
    """Table ids as stored in the file: 0 to 3 for DC coefficients, 16 to 19 for AC coefficients."""


def _read(data: bytes) -> None:
    """Walk through a file. Raises _OtherError or IndexError if it is unusual or ends early."""
    _require(data.startswith(_START))
    state, at = _State(), 2
    while (marker := data[at : at + 2]) != _END:
        size = int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + size]
        _require(len(body) == size - 2)
        at += 2 + size
        if marker == _SCAN:
            _scan(body, state)
            at = _end_of_scan(data, at)
        elif marker not in _SKIPPED:
            _segment(marker, body, state)
    _require(state.scans > 0 and all(component.begun for component in state.components.values()))


def _require(holds: bool) -> None:
    if not holds:
        raise _OtherError


def _end_of_scan(data: bytes, at: int) -> int:
    found = _MARKER.search(data, at)
    _require(found is not None)
    return found.start() if found else at


def _segment(marker: bytes, body: bytes, state: _State) -> None:
    if marker == _HUFFMAN:
        _huffman(body, state)
    elif marker == _QUANTIZATION:
        _quantization(body, state)
    elif marker in _SEQUENTIAL or marker == _PROGRESSIVE:
        _frame(body, state)
        state.progressive = marker == _PROGRESSIVE
    else:
        _require(marker == _RESTART and len(body) == 2)


def _quantization(body: bytes, state: _State) -> None:
    at = 0
    while at < len(body):
        wide, number = divmod(body[at], 16)
        at += 1 + 64 * (1 + wide)
        _require(wide < 2 and number < 4 and at <= len(body))
        state.quantization.add(number)


def _huffman(body: bytes, state: _State) -> None:
    at = 0
    while at < len(body):
        which, counts = body[at], body[at + 1 : at + 17]
        _require(which in (0, 1, 2, 3, 16, 17, 18, 19) and _is_code(counts))
        symbols = body[at + 17 : at + 17 + sum(counts)]
        _require(len(symbols) == sum(counts) and (which > 3 or max(symbols) <= _MAX_DIFFERENCE))
        state.huffman.add(which)
        at += 17 + len(symbols)


@lru_cache(1 << 10)
def _is_code(counts: bytes) -> bool:
    """Return whether a prefix code with these counts of 1- to 16-bit words exists, none of them all ones."""
    used = sum(count << 16 - length for length, count in enumerate(counts, 1))  # Kraft sum times 2**16
    return len(counts) == 16 and 0 < sum(counts) <= 256 and used < 1 << 16


def _frame(body: bytes, state: _State) -> None:
    height, width, count = int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[5]
    _require(not state.components and body[0] == 8 and count in (1, 3) and len(body) == 6 + 3 * count)
    _require(0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE)
    _require((height + 31) * (width + 31) <= _MAX_AREA)  # an MCU is at most 32 x 32
    for name, sampling, table in zip(body[6::3], body[7::3], body[8::3], strict=True):
        _require(sampling >> 4 in (1, 2, 4) and sampling & 15 in (1, 2, 4) and table < 4)
        state.components[name] = _Component((sampling >> 4) * (sampling & 15), table)
    _require(len(state.components) == count)


def _scan(body: bytes, state: _State) -> None:
    count = body[0]
    _require(len(body) == 4 + 2 * count)
    names, tables = body[1 : 1 + 2 * count : 2], body[2 : 2 + 2 * count : 2]
    _require(0 < len(set(names)) == count and all(name in state.components for name in names))
    components = [state.components[name] for name in names]
    _require(count == 1 or sum(component.blocks for component in components) <= _MAX_BLOCKS)
    _require(all(component.quantization in state.quantization for component in components))
    first, last, (earlier, shift) = body[-3], body[-2], divmod(body[-1], 16)
    if state.progressive:
        _require(last == 0 if first == 0 else count == 1 and first <= last < 64)
        _require(shift <= _MAX_SHIFT and earlier in (0, shift + 1))
    else:
        _require((first, last, earlier, shift) == (0, 63, 0, 0) and count == len(state.components) and not state.scans)
    for component, table in zip(components, tables, strict=True):
        _require(first > 0 or earlier > 0 or table >> 4 in state.huffman)
        _require(last == 0 or 16 + (table & 15) in state.huffman)
        component.begun |= first == 0 and earlier == 0
    state.scans += 1
