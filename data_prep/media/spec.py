"""The media contract: how many tokens a medium takes, and where they lie, from its header alone.

A recipe states it, the manifest holds it, and a model that makes other tokens is refused. So samples are packed, and
limits hold, before a pixel is read::

    spec = MediaSpec(image=AnyresImages(kind="anyres", tokens=64, tile_px=336))
    spec.image.extent(Header(width=1200, height=400))   # 3 tiles and a thumbnail: 256 tokens

All tokens of one medium are one run in the row, and share one ``instance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.common.modalities import IMAGE
from data_prep.media.native import fill_budget, keep_size
from data_prep.media.tiles import Grid, by_aspect, by_resolution, grids_up_to

MAX_TILES = 1 << 10
"""Most tiles of an image; published models use up to 40."""
MAX_SIDE_PX = 1 << 14
MAX_TOKENS = 1_000_000
"""Most tokens of one medium."""
TABLE_COLUMNS = 7
"""Numbers of a medium in the media table of a row: modality, `Extent.grid`, `Extent.tokens`, `Extent.view`."""
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Pixels = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
Side = Annotated[int, Field(ge=1, le=MAX_TILES)]
MediaTable = npt.NDArray[np.int32]
"""int32[media, TABLE_COLUMNS], the media of a row in order of instance."""


class Header(NamedTuple):
    """What the header of a medium tells."""

    width: int
    """In pixels, upright."""
    height: int


class Extent(NamedTuple):
    """The tokens of one medium."""

    tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)
    """Tokens as (time, rows, columns), whose product is `tokens`; zeros: they do not form one grid."""
    view: Grid = (1, 1)
    """How the pixels are read: tiles (anyres) or patches (native), as (rows, columns)."""

    def row(self, modality: int) -> tuple[int, ...]:
        """Return the medium's row of a media table."""
        return modality, *self.grid, self.tokens, *self.view


def extents(table: MediaTable) -> list[Extent]:
    """Return the extents of the media of a table."""
    return [
        Extent(tokens, (time, rows, columns), (high, wide))
        for _, time, rows, columns, tokens, high, wide in table.tolist()
    ]


class _Images(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def view_tokens(self) -> int:
        """Tokens of one view: of one picture that the tower reads, or 1 where images have their own sizes."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int:
        """Most tokens of one image."""
        raise NotImplementedError

    def extent(self, header: Header) -> Extent:
        """Return the tokens of an image of this size."""
        raise NotImplementedError

    def fits(self, extent: Extent) -> bool:
        """Return whether an image of some size has this extent."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return it in words."""
        raise NotImplementedError


class FixedImages(_Images):
    """Every image is resized to one square and takes the same tokens."""

    kind: Literal["fixed"] = "fixed"
    """fixed: one size for every image."""
    tokens: Tokens
    """Tokens of an image; the model's connector must make as many."""

    @property
    def view_tokens(self) -> int:
        """Return the tokens of an image, which is one view."""
        return self.tokens

    @property
    def most_tokens(self) -> int:
        """Return the tokens of an image."""
        return self.tokens

    def extent(self, header: Header) -> Extent:
        """Return the same tokens for every image."""
        return Extent(self.tokens)

    def fits(self, extent: Extent) -> bool:
        """Return whether it is the extent of every image."""
        return extent == Extent(self.tokens)

    def describe(self) -> str:
        """Return ``144 tokens an image``."""
        return f"{self.tokens} tokens an image"


class AnyresImages(_Images):
    """An image is resized to the grid of square tiles that suits its shape; the tower reads each tile.

    With more than one tile, the whole image is read as well, resized to one tile. Tokens follow view by view: tiles row
    by row, the thumbnail before or after them.
    """

    kind: Literal["anyres"]
    """anyres: a thumbnail and tiles, as in LLaVA-NeXT and InternVL."""
    tokens: Tokens
    """Tokens of one tile; the model's connector must make as many of an image."""
    tile_px: Pixels
    """Side of a tile in pixels; must be the size of the model's tower."""
    max_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] = 12
    """Most tiles of an image, without its thumbnail."""
    grids: tuple[tuple[Side, Side], ...] = ()
    """Allowed (rows, columns) of tiles, instead of all with up to `max_tiles`."""
    choose: Literal["aspect", "resolution"] = "aspect"
    """Which grid: the nearest aspect ratio (InternVL), or the one that keeps most pixels (LLaVA-NeXT)."""
    thumbnail: Literal["first", "last", "none"] = "first"
    """Where the whole image stands, if there are several tiles."""

    @model_validator(mode="after")
    def _bounded(self) -> AnyresImages:
        if any(rows * columns > MAX_TILES for rows, columns in self.grids):
            raise ValueError(f"grids: a grid has more than {MAX_TILES} tiles")
        if self.most_tokens > MAX_TOKENS:
            raise ValueError(f"an image would take up to {self.most_tokens} tokens: lower max_tiles or tokens")
        return self

    @cached_property
    def all_grids(self) -> tuple[Grid, ...]:
        """The grids to choose from."""
        return self.grids or grids_up_to(self.max_tiles)

    @property
    def view_tokens(self) -> int:
        """Return the tokens of one tile."""
        return self.tokens

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the image with the largest grid."""
        return self.tokens * max(map(self.views, self.all_grids))

    def views(self, grid: Grid) -> int:
        """Return the pictures that the tower reads of an image with this grid of tiles."""
        tiles = grid[0] * grid[1]
        return tiles + (tiles > 1 and self.thumbnail != "none")

    def extent(self, header: Header) -> Extent:
        """Return the tokens of all views of an image."""
        rule = by_aspect if self.choose == "aspect" else by_resolution
        grid = rule((header.width, header.height), self.all_grids, self.tile_px)
        return Extent(self.tokens * self.views(grid), view=grid)

    def fits(self, extent: Extent) -> bool:
        """Return whether the grid is one of those allowed, with its tokens."""
        return extent.view in self.all_grids and extent == Extent(
            self.tokens * self.views(extent.view), view=extent.view
        )

    def describe(self) -> str:
        """Return ``64 tokens a tile, up to 13 tiles an image``."""
        return f"{self.tokens} tokens a tile, up to {self.most_tokens // self.tokens} tiles an image"


class NativeImages(_Images):
    """An image keeps its shape: it is resized to a grid of patches of its own, and has as many tokens."""

    kind: Literal["native"]
    """native: as many patches as the image's size asks for, as in SigLIP 2 NaFlex and Qwen2-VL."""
    patch_px: Pixels
    """Side of a patch in pixels; must be that of the model's tower."""
    merge: Annotated[int, Field(ge=1, le=16)] = 1
    """Patches per side that become one token; must be the factor of the model's connector."""
    min_tokens: Tokens = 1
    """Fewest tokens of an image, with resize=size."""
    max_tokens: Tokens = 256
    """Most tokens of an image."""
    resize: Literal["budget", "size"] = "budget"
    """budget: enlarge or shrink every image to `max_tokens` (SigLIP 2); size: keep its size between `min_tokens` and
    `max_tokens` (Qwen2-VL)."""

    @model_validator(mode="after")
    def _ordered(self) -> NativeImages:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: lower it")
        return self

    @property
    def view_tokens(self) -> int:
        """Return 1: the smallest image is one token."""
        return 1

    @property
    def most_tokens(self) -> int:
        """Return `max_tokens`."""
        return self.max_tokens

    def extent(self, header: Header) -> Extent:
        """Return the tokens of an image and their grid."""
        size, unit = (header.width, header.height), self.patch_px * self.merge
        if self.resize == "budget":
            rows, columns = fill_budget(size, unit, self.max_tokens)
        else:
            rows, columns = keep_size(size, unit, self.min_tokens, self.max_tokens)
        return self._of(rows, columns)

    def fits(self, extent: Extent) -> bool:
        """Return whether tokens and patches match, and are bounded."""
        _, rows, columns = extent.grid
        return 0 < extent.tokens <= self.max_tokens and extent == self._of(rows, columns)

    def _of(self, rows: int, columns: int) -> Extent:
        return Extent(rows * columns, (1, rows, columns), (rows * self.merge, columns * self.merge))

    def describe(self) -> str:
        """Return ``up to 256 tokens an image``."""
        return f"up to {self.max_tokens} tokens an image"


Images = Annotated[FixedImages | AnyresImages | NativeImages, Field(discriminator="kind")]


class MediaSpec(BaseModel):
    """How media become tokens; equal in the packs and in the model that is trained on them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    image: Images
    """How images are resized and cut; `kind` is fixed, anyres or native."""

    @classmethod
    def fixed(cls, tokens: int) -> MediaSpec:
        """Return the spec of images that all take the same tokens."""
        return cls(image=FixedImages(tokens=tokens))

    @property
    def is_fixed(self) -> bool:
        """Whether all media take the same tokens, so rows need no media table."""
        return self.image.kind == "fixed"

    def table(self, headers: Sequence[Header]) -> MediaTable:
        """Return the media table of images."""
        rows = [self.image.extent(header).row(IMAGE) for header in headers]
        return np.array(rows, dtype=np.int32).reshape(-1, TABLE_COLUMNS)
