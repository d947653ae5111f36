"""Images: safe decoding, and the content-addressed store whose row ids the packs hold.

A store folder holds ``store.json`` (every shard with its sha256) and ``images-00000.arrow`` ... (Arrow IPC files,
memory mapped) with the original encoded bytes, each distinct image once. Nothing is re-encoded; decoding happens where
the pixels are needed, with ``decode_rgb``.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_prep.errors import UserError
from data_prep.packs import FileEntry, is_of_size, sha256_file
from data_prep.quarantine import BadSample

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Formats that are read; others (EPS runs an interpreter) are never even tried."""
STORE_FORMAT, STORE_VERSION = "mma-images", 1
IMAGE_SCHEMA = pa.schema(
    [("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()), ("data", pa.large_binary())]
)
Image.init()  # Pillow registers some of these formats only on demand, and `open` looks them up by name
# Filters belong to the process, and images are decoded in threads: nothing here may set them for the time of a call.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_check_size` refuses such an image
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # corrupt EXIF: the pixels decide
_TURNED = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange width and height."""
_DCT_FRAMES = {bytes((0xFF, marker)) for marker in (0xC0, 0xC1, 0xC2)}
"""Markers of baseline, extended and progressive frames of a JPEG."""
_BEFORE_FRAME = {bytes((0xFF, marker)) for marker in (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)}
"""Markers of what may stand before its frame: tables, restart intervals, applications' data, comments."""
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class BadImage(BadSample):
    """The bytes are not a usable image; ``code`` and ``detail`` say why."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode any usable image to 8-bit RGB, upright.

    The first frame of animations is taken, EXIF rotation is applied, transparency is composited on white and 16-bit
    samples are scaled. Pillow's decompression-bomb limit stays in force and truncated files are refused.

    Raises:
        BadImage: empty, foreign, damaged, tiny or oversized bytes.
    """
    return _to_rgb(_load_upright(data, small=False)[0])


def check_image(data: bytes) -> tuple[int, int]:
    """Return (width, height), upright, of what ``decode_rgb`` decodes; in a third of its time where it is a JPEG.

    Raises:
        BadImage: exactly where ``decode_rgb`` does.
    """
    image, size = _load_upright(data, small=True)
    _to_rgb(image.crop((0, 0, 1, 1)))  # whether a pixel format can be turned into RGB does not depend on the pixels
    return size


def _load_upright(data: bytes, *, small: bool) -> tuple[Image.Image, tuple[int, int]]:
    """Load an image and turn it upright; return it with its upright size.

    A ``small`` JPEG is loaded in grey, at an eighth of its sides: all of its data is read, and few pixels are computed.
    """
    if not data:
        raise BadImage("empty-file", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image)
        size = image.size
        reduced = small and _has_dct_frame(data) and _reduce(image)
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        ImageOps.exif_transpose(image, in_place=True)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("image-bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", f"{len(data)} bytes beginning with {data[:12]!r}") from error
    except _DAMAGE as error:
        raise BadImage("broken-image", f"{type(error).__name__}: {error}") from error
    if not reduced:
        return image, image.size
    return image, size[::-1] if turned else size


def _has_dct_frame(data: bytes) -> bool:
    """Return whether the first frame of a JPEG is one that libjpeg can scale.

    Asked to scale a lossless one, it would write whole lines where Pillow has room for an eighth. Only headers that
    cannot be read in two ways pass.
    """
    at = 2
    while data[at : at + 2] in _BEFORE_FRAME:
        size = int.from_bytes(data[at + 2 : at + 4])
        if size < 2:
            return False
        at += 2 + size
    return data[at : at + 2] in _DCT_FRAMES


def _reduce(image: Image.Image) -> bool:
    """Ask for an eighth of the sides, in grey; return whether the format can do that without reading less."""
    return image.draft("L", (max(1, image.width // 8), max(1, image.height // 8))) is not None


def _check_size(image: Image.Image) -> None:
    size = f"{image.width} x {image.height} pixels"
    if min(image.size) < 2:
        raise BadImage("tiny-image", size)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise BadImage("image-bomb", f"{size}, the limit is {Image.MAX_IMAGE_PIXELS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # `convert` would clip 16-bit samples to white
        samples = np.asarray(image, dtype=np.int64)
        return Image.fromarray((samples.clip(0, 65535) // 257).astype(np.uint8), "L").convert("RGB")
    if image.mode == "F":
        raise BadImage("odd-pixels", "floating-point samples have no known white")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def misnamed(data: bytes, name: str) -> bool:
    """Return whether a file name's suffix says another format than its bytes do (a GIF named .jpg)."""
    said, found = _SUFFIXES.get(PurePath(name).suffix.lower()), next((one for sign, one in _SIGNS if sign(data)), None)
    return said is not None and found is not None and said != found


_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP"}
_SIGNS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda data: data.startswith(b"\xff\xd8\xff"), "JPEG"),
    (lambda data: data.startswith(b"\x89PNG"), "PNG"),
    (lambda data: data.startswith(b"GIF8"), "GIF"),
    (lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", "WEBP"),
    (lambda data: data.startswith(b"BM"), "BMP"),
)


class ImageStore:
    """Random access to the images of a store folder; memory-mapped, lazily opened, safe to pickle to workers."""

    def __init__(self, directory: Path | str) -> None:
        """Open a store. Raises UserError when ``store.json`` is absent, foreign or malformed."""
        self.directory = Path(directory)
        path = self.directory / "store.json"
        if not path.is_file():
            raise UserError(f"{self.directory}: no image store here (store.json is missing); run mma-prep again")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if (raw["format"], raw["version"]) != (STORE_FORMAT, STORE_VERSION):
                raise UserError(f"{path}: not a {STORE_FORMAT} index of version {STORE_VERSION}; run mma-prep again")
            self.shards = tuple(FileEntry(**entry) for entry in raw["shards"])
        except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: malformed image store index ({error}); run mma-prep again") from error
        self._starts = np.cumsum([0] + [entry.rows for entry in self.shards])
        self._batches: dict[int, pa.RecordBatch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def identity(self) -> str:
        """Sha256 of the index, which holds the sha256 of every shard: what packs remember of their store."""
        return hashlib.sha256((self.directory / "store.json").read_bytes()).hexdigest()

    def read(self, row: int) -> bytes:
        """Return the encoded bytes of an image, as they were found. Raises IndexError outside the store."""
        return bytes(self._cell("data", row).as_buffer())

    def sha256(self, row: int) -> str:
        """Return the hex sha256 of an image's encoded bytes."""
        return bytes(self._cell("sha256", row).as_py()).hex()

    def hashes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
        """Return the raw sha256 (``S32``) of images. Raises IndexError outside the store."""
        found = np.empty(len(rows), dtype="S32")
        for which in np.unique(np.searchsorted(self._starts, rows, side="right") - 1).tolist():
            start, stop = self._starts[which], self._starts[which + 1]
            here = (rows >= start) & (rows < stop)
            column = self._open(self.shards[which]).column("sha256")
            found[here] = np.frombuffer(column.buffers()[1], dtype="S32", count=stop - start)[rows[here] - start]
        return found

    def size(self, row: int) -> tuple[int, int]:
        """Return (width, height) in pixels, upright."""
        return self._cell("width", row).as_py(), self._cell("height", row).as_py()

    def verify(self) -> None:
        """Hash every shard. Raises UserError naming the first missing or altered one."""
        for entry in self.shards:
            path = self.directory / entry.name
            if not path.is_file():
                raise UserError(f"{path}: listed in store.json but missing; run mma-prep again")
            if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
                raise UserError(
                    f"{path}: differs from store.json (damaged or edited); delete it and run mma-prep again"
                )

    def is_complete(self) -> bool:
        """Return whether every shard is there and has its size."""
        return all(is_of_size(self.directory / entry.name, entry.bytes) for entry in self.shards)

    def _cell(self, column: str, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"image {row} of {len(self)} in {self.directory}")
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        if which not in self._batches:
            self._batches[which] = self._open(self.shards[which])
        return self._batches[which].column(column)[row - int(self._starts[which])]

    def _open(self, entry: FileEntry) -> pa.RecordBatch:
        path = self.directory / entry.name
        try:
            with pa.memory_map(str(path)) as mapped:  # the batch keeps the map: a store may have more shards than files
                batch = pa.ipc.open_file(mapped).get_batch(0)  # may be open
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete what is there and run mma-prep again") from error
        if batch.num_rows != entry.rows or batch.schema != IMAGE_SCHEMA:
            raise UserError(f"{path}: not the images that store.json lists; delete it and run mma-prep again")
        return batch
