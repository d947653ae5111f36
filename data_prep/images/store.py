"""Images: safe decoding, and the content-addressed store whose row ids the packs hold.

A store folder holds ``store.json`` (every shard with its sha256, see ``data_prep.common.store_index``) and
``images-00000.arrow`` ... (Arrow IPC files, memory mapped) with the original encoded bytes, each distinct image once.
Nothing is re-encoded; ``decode_rgb`` decodes where pixels are needed.
"""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image, UnidentifiedImageError

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import FileEntry, is_of_size, sha256_file
from data_prep.common.store_index import StoreIndex
from data_prep.images.jpeg import surely_decodes
from data_prep.quarantine import BadSample

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Formats that are read; others (EPS runs an interpreter) are never tried."""
SHARD_BATCH_ROWS = 64
"""Rows per record batch, except the last one of a shard: held in memory during writing."""
OPEN_SHARDS = 1 << 14
"""Maximum number of open shards: each uses one memory map, and a process may have 65,530 by default."""
IMAGE_SCHEMA = pa.schema(
    [("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()), ("data", pa.large_binary())]
)
Image.init()  # Pillow registers some of these formats only on demand, and `open` looks them up by name
# Warning filters are per process and images are decoded in threads, so filters cannot be set per call.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_check_size` refuses such an image
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # corrupt EXIF: the pixels decide
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, struct.error, zlib.error),
    *(TypeError, AttributeError, AssertionError, RuntimeError),  # Pillow meets a value of an unexpected type
)
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that makes the image upright."""


class BadImage(BadSample):
    """The bytes are not a usable image; ``code`` and ``detail`` give the reason."""


def decode_rgb(data: bytes, *, draft_px: int = 0) -> Image.Image:
    """Decode any usable image to 8-bit RGB, upright.

    Takes the first frame of animations, applies EXIF rotation, composites transparency on white and scales 16-bit
    samples. Pillow's decompression-bomb limit applies, and truncated files are refused.

    Args:
        data: encoded bytes.
        draft_px: decode a JPEG at a half, a quarter or an eighth of its size, the smallest whose sides are at least
            this long. libjpeg then computes smaller blocks, which is faster than decoding in full; the result is close
            to, but not equal to, the image in full resized. 0 = in full.

    Raises:
        BadImage: empty, foreign, damaged, tiny or oversized bytes.
    """
    with _refusals(data):
        image = _open(data)
        if draft_px:
            image.draft(None, (draft_px, draft_px))
        return _to_rgb(_load_upright(image))


def check_image(data: bytes) -> tuple[int, int]:
    """Return the upright (width, height) of an image; most JPEGs are checked without decoding.

    Raises:
        BadImage: exactly when ``decode_rgb`` does.
    """
    with _refusals(data):
        image = _open(data)
        if _surely_loads(image, data):
            return image.size
        image = _load_upright(image)
        _to_rgb(image.crop((0, 0, 1, 1)))  # one pixel is enough to check the pixel format
        return image.size


def declared_pixels(data: bytes) -> int:
    """Return the number of pixels that an image's header declares, without decoding it. Raises BadImage."""
    with _refusals(data):
        width, height = _open(data).size
        return int(width * height)


@contextmanager
def _refusals(data: bytes) -> Iterator[None]:
    """Turn exceptions of Pillow into BadImage."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadImage("image-bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", f"{len(data)} bytes beginning with {data[:12]!r}") from error
    except _DAMAGE as error:
        raise BadImage("broken-image", f"{type(error).__name__}: {error}") from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty-file", "0 bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image)
    return image


def _load_upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright; None for damaged EXIF, because the pixels are usable.

    ``ImageOps.exif_transpose`` would rewrite the EXIF data and fail on any tag of an unexpected type.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except _DAMAGE:
        return None


def _surely_loads(image: Image.Image, data: bytes) -> bool:
    """Return whether an open image is certain to load as RGB or grey and is already upright."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not surely_decodes(data):
        return False
    return _turn(image) is None


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
    """Return whether the suffix of a file name contradicts its bytes (a GIF named .jpg)."""
    named = _SUFFIXES.get(PurePath(name).suffix.lower())
    found = next((format for has_format, format in _MAGIC if has_format(data)), None)
    return named is not None and found is not None and named != found


_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP"}
_MAGIC: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda data: data.startswith(b"\xff\xd8\xff"), "JPEG"),
    (lambda data: data.startswith(b"\x89PNG"), "PNG"),
    (lambda data: data.startswith(b"GIF8"), "GIF"),
    (lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", "WEBP"),
    (lambda data: data.startswith(b"BM"), "BMP"),
)


class ImageStore:
    """Random access to the images of a store folder; memory-mapped, lazily opened, safe to pickle to workers."""

    def __init__(self, directory: Path | str) -> None:
        """Open a store. Raises UserError if ``store.json`` is missing, foreign, damaged or malformed."""
        self.directory = Path(directory)
        index = StoreIndex.load(self.directory)
        self.shards, self.identity = index.shards, index.sha256
        """Sha256 of the index, which holds the sha256 of every shard; packs store it to identify their images."""
        self._starts = np.cumsum([0] + [entry.rows for entry in self.shards])
        self._open_shards: dict[int, pa.ipc.RecordBatchFileReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row: int) -> bytes:
        """Return the original encoded bytes of an image. Raises IndexError outside the store."""
        return bytes(self._cell("data", row).as_buffer())

    def sha256(self, row: int) -> str:
        """Return the hex sha256 of an image's encoded bytes."""
        return bytes(self._cell("sha256", row).as_py()).hex()

    def hashes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
        """Return the raw sha256 (``S32``) of images. Raises IndexError outside the store."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"images {rows.min()} to {rows.max()} of {len(self)} in {self.directory}")
        found = np.empty(len(rows), dtype="S32")
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        batches, places = np.divmod(rows - self._starts[shards], SHARD_BATCH_ROWS)
        order = np.lexsort((batches, shards))  # every batch is read once
        changes = np.flatnonzero((np.diff(shards[order]) != 0) | (np.diff(batches[order]) != 0)) + 1
        for here in np.split(order, changes) if len(order) else ():
            column = self._batch(int(shards[here[0]]), int(batches[here[0]])).column("sha256")
            found[here] = np.frombuffer(column.buffers()[1], dtype="S32", count=len(column))[places[here]]
        return found

    def size(self, row: int) -> tuple[int, int]:
        """Return (width, height) in pixels, upright."""
        batch, place = self._locate(row)
        return batch.column("width")[place].as_py(), batch.column("height")[place].as_py()

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

    def missing(self) -> list[tuple[int, int]]:
        """Return the rows ``[start, stop)`` of every shard that is missing or has the wrong size."""
        ranges = zip(self.shards, itertools.pairwise(self._starts.tolist()), strict=True)
        return [rows for entry, rows in ranges if not is_of_size(self.directory / entry.name, entry.bytes)]

    def shard_of(self, start: int, stop: int) -> FileEntry | None:
        """Return the shard that holds exactly the rows ``[start, stop)``, or None."""
        which = int(np.searchsorted(self._starts, start))
        return self.shards[which] if self._starts[which : which + 2].tolist() == [start, stop] else None

    def _cell(self, column: str, row: int) -> Any:
        batch, place = self._locate(row)
        return batch.column(column)[place]

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        """Return the record batch that holds an image, and its place there."""
        if not 0 <= row < len(self):
            raise IndexError(f"image {row} of {len(self)} in {self.directory}")
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, place = divmod(row - int(self._starts[which]), SHARD_BATCH_ROWS)
        return self._batch(which, batch), place

    def _batch(self, which: int, number: int) -> pa.RecordBatch:
        """Return a record batch of a shard, whose offsets are checked: damaged ones would be read out of bounds."""
        try:
            batch = self._shard(which).get_batch(number)
            batch.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(self.shards[which], error) from error
        return batch

    def _shard(self, which: int) -> pa.ipc.RecordBatchFileReader:
        reader = self._open_shards.get(which)
        if reader is None:
            if len(self._open_shards) >= OPEN_SHARDS:
                self._open_shards.clear()  # a thread that is reading one keeps it
            reader = self._open_shards[which] = self._open(self.shards[which])
        return reader

    def _unreadable(self, entry: FileEntry, error: Exception) -> UserError:
        path = self.directory / entry.name
        return UserError(f"{path}: cannot be read ({one_line(error)}); delete it and run mma-prep again")

    def _open(self, entry: FileEntry) -> pa.ipc.RecordBatchFileReader:
        path = self.directory / entry.name
        try:
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file.read_buffer())  # keeps the map, but no file descriptor
            batches = reader.num_record_batches
            rows = (batches - 1) * SHARD_BATCH_ROWS + reader.get_batch(batches - 1).num_rows if batches else 0
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(entry, error) from error
        if rows != entry.rows or reader.schema != IMAGE_SCHEMA:
            raise UserError(f"{path}: not the images that store.json lists; delete it and run mma-prep again")
        return reader
