"""The structural check of JPEGs, compared with decoding them."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data_prep.images.jpeg import surely_decodes
from data_prep.images.store import BadImage, check_image, decode_rgb

Edit = Callable[[bytes], bytes]


def drawn(mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


USUAL: dict[str, bytes] = {
    "plain": drawn(),
    "grey": drawn("L"),
    "progressive": drawn(progressive=True),
    "progressive grey": drawn("L", progressive=True),
    "full colour": drawn(subsampling="4:4:4", quality=95),
    "half colour": drawn(subsampling="4:2:2", optimize=True),
    "quarter colour": drawn(subsampling="4:1:1"),
    "restarts": drawn(restart_marker_blocks=2),
    "progressive with restarts": drawn(restart_marker_rows=1, progressive=True, optimize=True),
    "comment": drawn(comment=b"\xff\xd9 no end"),
    "profile": drawn(icc_profile=bytes(70_000)),
    "coarse": drawn(quality=1),
}


@pytest.mark.parametrize("name", USUAL)
def test_what_encoders_write_surely_decodes(name: str) -> None:
    assert surely_decodes(USUAL[name])
    assert surely_decodes(USUAL[name] + b"what follows the end is not read")
    assert check_image(USUAL[name]) == decode_rgb(USUAL[name]).size


def segment(marker: int, data: bytes = USUAL["plain"]) -> tuple[int, int]:
    """Return where the first segment of a kind begins and ends."""
    at = 2
    while data[at + 1] != marker:
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return at, at + 2 + int.from_bytes(data[at + 2 : at + 4])


def without(marker: int) -> bytes:
    first, last = segment(marker)
    return USUAL["plain"][:first] + USUAL["plain"][last:]


def changed(marker: int, offset: int, value: int) -> bytes:
    """Set a byte, counted from the marker of a segment."""
    out = bytearray(USUAL["plain"])
    out[segment(marker)[0] + offset] = value
    return bytes(out)


QUANTIZATION, HUFFMAN, FRAME, SCAN = 0xDB, 0xC4, 0xC0, 0xDA
UNUSUAL: dict[str, bytes] = {
    "nothing": b"",
    "another format": b"\x89PNG",
    "no end": USUAL["plain"][:-2],
    "only headers": USUAL["plain"][: segment(SCAN)[1]],
    "ends in a header": USUAL["plain"][:300],
    "no scan": USUAL["plain"][: segment(SCAN)[0]] + b"\xff\xd9",
    "four colours": drawn("CMYK"),
    "padded marker": USUAL["plain"][:2] + b"\xff" + USUAL["plain"][2:],
    "segment of no length": USUAL["plain"][:2] + b"\xff\xe1\x00\x00" + USUAL["plain"][2:],
    "lossless": changed(FRAME, 1, 0xC3),
    "arithmetic": changed(FRAME, 1, 0xC9),
    "12 bits": changed(FRAME, 4, 12),
    "no height": changed(FRAME, 6, 0),
    "sampled by three": changed(FRAME, 11, 0x33),
    "component twice": changed(FRAME, 13, 1),
    "table of no number": changed(FRAME, 12, 4),
    "two frames": USUAL["plain"][: segment(FRAME)[1]] + USUAL["plain"][segment(FRAME)[0] :],
    "no frame": without(FRAME),
    "no quantization": without(QUANTIZATION),
    "quantization of odd width": changed(QUANTIZATION, 4, 0x20),
    "a code table less": without(HUFFMAN),
    "codes of no class": changed(HUFFMAN, 4, 0x20),
    "more codes than there are": changed(HUFFMAN, 5, 2),
    "a first coefficient of 16 bits": changed(HUFFMAN, 4 + 17, 16),
    "scan of an unknown component": changed(SCAN, 5, 9),
    "scan with an unknown table": changed(SCAN, 6, 0x30),
    "scan of half the coefficients": changed(SCAN, 4 + 1 + 6 + 1, 31),
    "sequential scan with a shift": changed(SCAN, 4 + 1 + 6 + 2, 1),
    "a first coefficient of 12 bits": changed(HUFFMAN, 4 + 17, 12),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_has_to_be_tried(name: str) -> None:
    assert not surely_decodes(UNUSUAL[name])


def test_progressive_scans_are_held_to_their_rules() -> None:
    whole = USUAL["progressive"]
    starts = [at for at in range(len(whole) - 1) if whole[at : at + 2] == b"\xff\xda"]
    size = [2 + int.from_bytes(whole[at + 2 : at + 4]) for at in starts]
    refused = 0
    for at, length in zip(starts, size, strict=True):
        for offset, value in ((length - 3, 64), (length - 2, 64), (length - 1, 0x0E), (length - 1, 0x31)):
            data = bytearray(whole)
            data[at + offset] = value
            refused += not surely_decodes(bytes(data))
    assert len(starts) > 5 and refused == 4 * len(starts)
    first_only = whole[: starts[1]] + b"\xff\xd9"  # coarse, but every component has begun
    assert surely_decodes(first_only) and decode_rgb(first_only).size == (53, 41)


def climbing(side: int, bits: int) -> bytes:
    """A progressive square whose first coefficients grow, all by the most that ``bits`` hold."""

    def part(marker: int, *body: int) -> bytes:
        return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + bytes(body)

    blocks = ((side + 7) // 8) ** 2
    words = int(("0" + "1" * bits) * 8, 2).to_bytes(1 + bits) * (blocks // 8 + 1)
    head = part(QUANTIZATION, 0, *[1] * 64) + part(HUFFMAN, 0, 1, *[0] * 15, bits)
    frame = part(0xC2, 8, *side.to_bytes(2), *side.to_bytes(2), 1, 1, 0x11, 0)
    scan = part(SCAN, 1, 1, 0, 0, 0, 0) + words.replace(b"\xff", b"\xff\x00")
    return b"\xff\xd8" + head + frame + scan + b"\xff\xd9"


@pytest.mark.parametrize(("side", "bits"), [(2100, 15), (9000, 11)])
def test_coefficients_that_leave_32_bits_are_not_sure(side: int, bits: int) -> None:
    assert surely_decodes(climbing(64, 11)) and decode_rgb(climbing(64, 11)).size == (64, 64)
    assert not surely_decodes(climbing(side, bits))
    with pytest.raises(BadImage, match="broken data stream"):
        decode_rgb(climbing(side, bits))


def flipped(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def header_changed(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(2, min(len(data), 700))] = rng.choice([rng.randrange(256), rng.randrange(8), 0, 255])


def ended(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(2, len(data)) :]
    data += rng.choice([b"", b"\xff\xd9"])


def hollowed(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 400] = bytes(len(data[at : at + 400]))


def interrupted(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = bytes((255, rng.choice([0xD0, 0xD7, 0xD9, 0xDA, 0xC4, 0xFF, 0x01, 0xFE, 0xDD])))


def moved(data: bytearray, rng: random.Random) -> None:
    at, length, to = rng.randrange(len(data)), rng.randint(1, 300), rng.randrange(len(data))
    data[to:to] = data[at : at + length]


EDITS = (flipped, flipped, header_changed, header_changed, ended, hollowed, interrupted, moved)


def decodes(data: bytes) -> bool:
    try:
        decode_rgb(data)
    except BadImage as problem:
        return problem.code in ("tiny-image", "image-bomb")  # of its size, not of its structure
    return True


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_makes_a_sure_jpeg_fail(seed: int) -> None:
    rng, found = random.Random(seed), Counter[tuple[bool, bool]]()
    for _ in range(1500):
        data = bytearray(rng.choice(list(USUAL.values())))
        for _ in range(rng.choice([1, 1, 2, 4])):
            rng.choice(EDITS)(data, rng)
            data = data if len(data) > 4 else bytearray(drawn())
        found[surely_decodes(bytes(data)), decodes(bytes(data))] += 1
    assert found[True, False] == 0
    assert min(found[True, True], found[False, False]) > 100
