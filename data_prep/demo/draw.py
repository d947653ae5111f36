"""Pictures of scenes: each shape is drawn once with Pillow, then pasted in colour onto grey."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image, ImageDraw

from data_prep.demo.scenes import GRID, Scene, Thing

CELL_PX = 12
SIDE_PX = GRID * CELL_PX
GROUND = (127, 127, 127)  # image processors map it to 0: a patch holds its object and nothing else
RGB = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50)}
RADIUS = {"small": 0.26, "big": 0.42}  # in cells: a big object stays inside its cell after a shift of one pixel
OVERSAMPLING = 8


@cache
def stamp(size: str, shape: str) -> Image.Image:
    """Return the antialiased 12 x 12 px coverage mask (mode L) of a shape."""
    side = CELL_PX * OVERSAMPLING
    centre, r = side / 2, RADIUS[size] * side
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)

    def box(reach: float) -> tuple[float, float, float, float]:
        return centre - reach, centre - reach, centre + reach, centre + reach

    if shape == "square":
        pen.rectangle(box(0.85 * r), fill=255)
    elif shape == "triangle":
        base, top, half = centre + 0.8 * r, centre - 0.9 * r, 0.98 * r
        pen.polygon([(centre, top), (centre - half, base), (centre + half, base)], fill=255)
    else:
        pen.ellipse(box(r), fill=255)
        if shape == "ring":
            pen.ellipse(box(0.55 * r), fill=0)
    return mask.reduce(OVERSAMPLING)


def corner(thing: Thing) -> tuple[int, int]:
    """Return the pixel ``(x, y)`` of the upper left corner of a thing's stamp."""
    row, column = divmod(thing.cell, GRID)
    return column * CELL_PX + thing.dx, row * CELL_PX + thing.dy


def bounding_box(thing: Thing) -> tuple[int, int, int, int]:
    """Return ``(x, y, width, height)`` in pixels of the area that is at least half covered."""
    extent = stamp(thing.look.size, thing.look.shape).point(lambda coverage: 255 * (coverage >= 128)).getbbox()
    assert extent is not None
    (x, y), (left, top, right, bottom) = corner(thing), extent
    return x + left, y + top, right - left, bottom - top


def draw(scene: Scene) -> Image.Image:
    """Return the scene as a 48 x 48 px RGB picture."""
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), GROUND)
    for thing in scene.things:
        image.paste(RGB[thing.look.colour], corner(thing), stamp(thing.look.size, thing.look.shape))
    return image


def encode(scene: Scene) -> bytes:
    """Return the scene as a nearly lossless JPEG: COCO file names end in .jpg."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
