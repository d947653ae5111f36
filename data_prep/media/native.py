"""How many patches an image of any size is resized to: arithmetic on its size alone.

Sizes are (width, height) in pixels; grids are (rows, columns) of patches, multiples of ``merge``.
"""

from __future__ import annotations

import math

from data_prep.media.tiles import Grid

_PRECISION = 1e-5  # of the scale, as in SigLIP 2's processor
_LEAST, _MOST = _PRECISION / 10, 100.0


def fill_budget(size: tuple[int, int], unit_px: int, most: int) -> Grid:
    """Return the largest grid of at most ``most`` units near the image's shape (SigLIP 2 NaFlex, arXiv 2502.14786).

    Small images are enlarged. The scale is found by bisection with the same steps as SigLIP 2's own processor.
    """
    width, height = size

    def grid_at(scale: float) -> Grid:
        return max(1, math.ceil(height * scale / unit_px)), max(1, math.ceil(width * scale / unit_px))

    low, high = _LEAST, _MOST
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        rows, columns = grid_at(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return grid_at(low)


def keep_size(size: tuple[int, int], unit_px: int, least: int, most: int) -> Grid:
    """Return the grid nearest to the image's own size, with ``least`` to ``most`` units (Qwen2-VL, arXiv 2409.12191).

    Of an image so long that ``most`` units cannot keep its shape, the long side is shortened; Qwen's own
    ``smart_resize`` exceeds its limit there.
    """
    width, height = size
    rows, columns = round(height / unit_px), round(width / unit_px)
    if rows * columns > most:
        shrink = math.sqrt(width * height / (most * unit_px**2))
        rows, columns = (max(1, math.floor(side / shrink / unit_px)) for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least * unit_px**2 / (width * height))
        rows, columns = (math.ceil(side * grow / unit_px) for side in (height, width))
    short = min(rows, columns, math.isqrt(most))
    long = min(max(rows, columns), most // short)
    return (short, long) if rows <= columns else (long, short)
