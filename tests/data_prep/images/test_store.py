import io
import pickle
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.images.store import BadImage, ImageStore, check_image, decode_rgb
from tests.data_prep.raw import make_recipe, png, prepare, write_world

W, H = 6, 4


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (W, H), value)


def sixteen_bit(value: int) -> bytes:
    return encode(Image.fromarray(np.full((H, W), value, dtype=np.uint16)))


def palette_with_hole() -> bytes:
    image = Image.new("P", (W, H), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encode(image, transparency=0)


def rotated(kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    return encode(flat("RGB", (9, 9, 9)), kind, exif=exif)


def turned_with(tag: int, kind: int, value: bytes) -> bytes:
    """A JPEG to be turned by 90 degrees, with another EXIF tag behind."""
    plain, entries = encode(flat("RGB", (9, 9, 9)), "JPEG"), ((0x0112, 3, b"\6\0\0\0"), (tag, kind, value))
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + b"".join(struct.pack("<HHI4s", *one[:2], 1, one[2]) for one in entries)
    return plain[:20] + b"\xff\xe1" + (len(exif) + 6).to_bytes(2) + exif + bytes(4) + plain[20:]


def tiff_with_strips_at_a_fraction() -> bytes:
    data = bytearray(encode(flat("RGB", (9, 9, 9)), "TIFF"))
    entry = data.index(struct.pack("<HHI", 273, 4, 1))
    data[entry + 2] = 11  # a float
    return bytes(data)


def animation(kind: str) -> bytes:
    frames = [flat("RGB", (255, 0, 0)), flat("RGB", (0, 0, 255))]
    return encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


GOOD: dict[str, tuple[Callable[[], bytes], tuple[int, int, int], tuple[int, int]]] = {
    "rgb": (lambda: encode(flat("RGB", (10, 20, 30))), (10, 20, 30), (W, H)),
    "grey": (lambda: encode(flat("L", 77)), (77, 77, 77), (W, H)),
    "one-bit": (lambda: encode(flat("1", 1)), (255, 255, 255), (W, H)),
    "16-bit is scaled": (lambda: sixteen_bit(128 * 257), (128, 128, 128), (W, H)),
    "16-bit dark stays dark": (lambda: sixteen_bit(300), (1, 1, 1), (W, H)),
    "clear pixels are white": (lambda: encode(flat("RGBA", (255, 0, 0, 0))), (255, 255, 255), (W, H)),
    "half clear": (lambda: encode(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127), (W, H)),
    "grey with alpha": (lambda: encode(flat("LA", (0, 0))), (255, 255, 255), (W, H)),
    "palette with a hole": (palette_with_hole, (255, 255, 255), (W, H)),
    "cmyk": (lambda: encode(flat("CMYK", (0, 0, 0, 255)), "JPEG"), (0, 0, 0), (W, H)),
    "exif rotation": (rotated, (9, 9, 9), (H, W)),
    "exif with a float for text": (lambda: turned_with(0x013B, 11, b"\0\0\xc0\x7f"), (9, 9, 9), (H, W)),
    "exif with bytes for a fraction": (lambda: turned_with(0x011A, 7, b"\1\0\0\0"), (9, 9, 9), (H, W)),
    "exif with a number below its range": (lambda: turned_with(0x011A, 9, b"\xff" * 4), (9, 9, 9), (H, W)),
    "rotated tiff": (lambda: rotated("TIFF"), (9, 9, 9), (H, W)),
    "gif first frame": (lambda: animation("GIF"), (255, 0, 0), (W, H)),
    "webp first frame": (lambda: animation("WEBP"), (255, 0, 0), (W, H)),
    "tiff": (lambda: encode(flat("RGB", (1, 2, 3)), "TIFF"), (1, 2, 3), (W, H)),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_pixel_format_becomes_upright_rgb(name: str) -> None:
    make, colour, size = GOOD[name]
    image = decode_rgb(make())
    assert (image.mode, image.size) == ("RGB", size) and check_image(make()) == size
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1


def noise(kind: str, variant: str = "") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 8 if variant == "turned" else 1
    more = {"exif": exif, "progressive": variant == "progressive"} if kind == "JPEG" else {}
    return encode(Image.fromarray(pixels).convert("CMYK" if variant == "CMYK" else "RGB"), kind, **more)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty-file"),
    "html": (lambda: b"<html><body>404</body></html>", "not-an-image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
    "truncated jpeg": (lambda: noise("JPEG")[:-400], "broken-image"),
    "truncated png": (lambda: noise("PNG")[:-4000], "broken-image"),
    "strips of a tiff at a fraction": (tiff_with_strips_at_a_fraction, "broken-image"),
    "one pixel": (lambda: encode(Image.new("RGB", (1, 1))), "tiny-image"),
    "float": (lambda: encode(flat("F", 0.5), "TIFF"), "odd-pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_bytes_are_refused_with_their_code(name: str) -> None:
    make, code = BAD[name]
    for read in (decode_rgb, check_image):
        with pytest.raises(BadImage) as caught:
            read(make())
        assert caught.value.code == code


@pytest.mark.parametrize("factor", [1.5, 3.0], ids=["warned about", "refused by Pillow"])
def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    data = png(1, (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(1600 / factor))
    with pytest.raises(BadImage, match="image-bomb"):
        decode_rgb(data)


def test_decoding_sets_no_filter_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "catch_warnings", lambda: pytest.fail("filters belong to the whole process"))
    assert decode_rgb(png(1, (8, 8))).size == (8, 8)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, truncate or replace a few bytes, mostly in the header."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(min(len(out), rng.choice([40, 200, len(out)])))
        choice = rng.random()
        if choice < 0.7:
            out[at] = rng.randrange(256)
        elif choice < 0.85:
            del out[at + 1 :]
        else:
            out[at : at + 4] = rng.randbytes(rng.randint(0, 8))
        out = out or bytearray(b"x")
    return bytes(out)


def outcome_of(read: Callable[[bytes], object], data: bytes) -> str:
    """Return the outcome of an image as text."""
    try:
        found = read(data)
        return f"RGB {found.size if isinstance(found, Image.Image) else found}"
    except BadImage as problem:
        return str(problem)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "JPEG CMYK", "PNG", "GIF", "WEBP", "BMP", "PPM"])
def test_damaged_bytes_decode_or_are_refused_and_the_check_agrees(kind: str) -> None:
    kind, _, variant = kind.partition(" ")
    whole, rng = noise(kind, variant), random.Random(0)
    outcomes = set()
    for _ in range(200):
        data = mutated(whole, rng)
        outcomes.add(outcome_of(decode_rgb, data))
        assert outcome_of(check_image, data) == outcome_of(decode_rgb, data)
    assert any(one.startswith("RGB") for one in outcomes) and len(outcomes) > 1


def test_check_and_decode_agree_on_every_truncated_jpeg() -> None:
    for variant in ("", "progressive", "turned"):
        whole = noise("JPEG", variant)
        for size in range(0, len(whole), 97):
            assert outcome_of(check_image, whole[:size]) == outcome_of(decode_rgb, whole[:size]), (variant, size)


def test_decoding_leaves_the_callers_warning_filters_alone() -> None:
    before = list(warnings.filters)
    decode_rgb(png(1))
    assert warnings.filters == before


def test_the_store_keeps_each_image_once_with_its_bytes(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    prepare(make_recipe(tmp_path))
    store = ImageStore(next((tmp_path / "out" / "images").iterdir()))
    data = [store.read(row) for row in range(len(store))]
    drawn = {png(seed) for seed in (*(key for key in range(60) if key % 10), 7, *(n for n in range(30) if n % 5))}
    assert set(data) == drawn and len(data) == len(drawn)
    assert {store.size(row) for row in range(len(store))} == {(8, 6)}
    copy = pickle.loads(pickle.dumps(store))
    assert copy.sha256(3) == store.sha256(3)
    store.verify()
    shard = store.directory / store.shards[0].name
    shard.write_bytes(shard.read_bytes().replace(data[0], data[0][::-1]))
    with pytest.raises(UserError, match=r"images-00000.arrow: differs"):
        store.verify()


def photo(width: int, height: int, **options: object) -> bytes:
    """A JPEG of smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 60, width // 60, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


@pytest.mark.parametrize(
    ("size", "draft_px", "wanted"),
    [((640, 480), 120, (160, 120)), ((640, 480), 121, (320, 240)), ((640, 480), 241, (640, 480)),
     ((641, 483), 60, (81, 61)), ((640, 480), 0, (640, 480))],
)  # fmt: skip
def test_a_draft_has_the_smallest_size_that_is_large_enough(
    size: tuple[int, int], draft_px: int, wanted: tuple[int, int]
) -> None:
    data = photo(*size)
    draft = decode_rgb(data, draft_px=draft_px)
    assert draft.size == wanted
    whole = decode_rgb(data)
    if draft.size == whole.size:
        assert draft.tobytes() == whole.tobytes()
    apart = np.abs(np.asarray(draft, dtype=float) - np.asarray(whole.reduce(-(-whole.width // draft.width))))
    assert apart.mean() < 2


def test_a_draft_is_upright_and_leaves_other_formats_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(photo(640, 320, exif=exif), draft_px=100).size == (160, 320)
    plain = encode(Image.new("RGB", (64, 48)), "PNG")
    assert decode_rgb(plain, draft_px=8).size == (64, 48)
    assert decode_rgb(encode(Image.new("L", (64, 48), 77), "JPEG"), draft_px=8).getpixel((0, 0)) == (77, 77, 77)
