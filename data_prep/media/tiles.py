"""Which grid of tiles an image is cut into: arithmetic on its size alone.

Grids are (rows, columns) of square tiles, sizes (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

Grid = tuple[int, int]
"""(rows, columns)."""


def grids_up_to(most: int) -> tuple[Grid, ...]:
    """Return all grids of 1 to ``most`` tiles, by number of tiles, as InternVL 1.5 tries them (arXiv 2404.16821)."""
    sides = range(1, most + 1)
    found = [(rows, columns) for columns in sides for rows in sides if rows * columns <= most]
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], grid[1])))


def by_aspect(size: tuple[int, int], grids: Sequence[Grid], tile_px: int) -> Grid:
    """Return the grid whose aspect ratio is nearest (InternVL 1.5, arXiv 2404.16821).

    Of equally near ones, the later wins if the image has more than half of its pixels.
    """
    width, height = size
    best, nearest = grids[0], float("inf")
    for rows, columns in grids:
        distance = abs(width / height - columns / rows)
        large = 2 * width * height > tile_px**2 * rows * columns
        if distance < nearest or (distance == nearest and large):
            best, nearest = (rows, columns), distance
    return best


def by_resolution(size: tuple[int, int], grids: Sequence[Grid], tile_px: int) -> Grid:
    """Return the grid that keeps most of the image's pixels, and of these the smallest (LLaVA-NeXT's anyres)."""
    width, height = size
    best, kept, wasted = grids[0], -1, 0
    for rows, columns in grids:
        wide, high = columns * tile_px, rows * tile_px
        scale = min(wide / width, high / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        waste = wide * high - pixels
        if pixels > kept or (pixels == kept and waste < wasted):
            best, kept, wasted = (rows, columns), pixels, waste
    return best
