"""The structure check of JPEGs: what it accepts, Pillow decodes."""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

from data_prep.images.jpeg import surely_decodes
from data_prep.images.store import BadImage, check_image, decode_rgb

MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE)
DICTIONARY = tuple(bytes((0xFF, marker)) for marker in MARKERS)


def run(data: bytes) -> None:
    """Compare the check with the decoder."""
    try:
        size = check_image(data)
    except BadImage:
        size = None
    try:
        decoded = decode_rgb(data).size
    except BadImage:
        decoded = None
    assert size == decoded
    if surely_decodes(data):
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def seeds() -> Iterator[bytes]:
    """Yield small JPEGs of each kind."""
    picture = Image.linear_gradient("L").resize((24, 17))
    for mode, options in (
        ("L", {}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"progressive": True, "subsampling": 0}),
        ("RGB", {"restart_marker_blocks": 1, "optimize": True}),
        ("CMYK", {}),
    ):
        stream = io.BytesIO()
        picture.convert(mode).save(stream, "JPEG", quality=60, **options)
        yield stream.getvalue()
