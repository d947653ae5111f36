"""A batch under test: the model's inputs, and which tokens belong together and are answers.

B rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from data_prep.common.errors import UserError

IGNORE = -100
TRUTH = ("segment", "generated")
"""Keys of a batch that only the prober reads, unless the model's forward names them."""
TOKEN_KEYS = (
    "input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "segment",
    "generated", "modality", "instance",
)  # fmt: skip
"""Inputs with one entry per token in their last dimension (a 4-D mask: in its last two)."""
PATCH_KEYS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
"""Inputs with one entry per image."""


class CannotSlice(Exception):  # noqa: N818
    """The batch holds an input of unknown layout, so samples cannot be cut out of it."""


@dataclass(frozen=True)
class ProbeBatch:
    """The inputs of a model and the truth about them."""

    inputs: Mapping[str, Any]
    """``input_ids`` int64[B, T] and everything else that the model takes."""
    segment: torch.Tensor
    """int64[B, T]: 1, 2, ... for the packed samples of a row; 0 = padding."""
    generated: torch.Tensor
    """bool[B, T]: tokens that the model writes at inference."""
    image_id: int | None = None
    """Token id at image positions; each run of it is one image."""
    place: str = "batch"
    """Where the batch was cut from, for messages."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any], *, image_id: int | None = None) -> ProbeBatch:
        """Read the truth from a batch.

        ``segment`` comes from the key of that name, from restarts of ``position_ids`` (of their first plane), or from
        a 2-D ``attention_mask``, in this order; ``generated`` from its key or from ``labels``.

        Raises UserError when a batch has no ``input_ids``, neither ``generated`` nor ``labels``, or is not on the CPU.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise UserError("a batch for the prober needs input_ids, an integer tensor of shape [rows, tokens]")
        if ids.device.type != "cpu":
            raise UserError("the prober compares runs on the CPU: move the model and the batch there")
        if "generated" in inputs:
            generated = inputs["generated"].bool()
        elif "labels" in inputs:
            generated = _generated_from_labels(ids, inputs["labels"])
        else:
            raise UserError("a batch for the prober needs labels (-100 = not trained) or a mask named generated")
        return cls(dict(inputs), _segments(inputs, ids), generated, image_id)

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, int64[B, T]."""
        ids: torch.Tensor = self.inputs["input_ids"]
        return ids

    @property
    def predicts(self) -> torch.Tensor:
        """Mark the positions whose next token is a target: it is generated and in the same sample; bool[B, T]."""
        marks = torch.zeros_like(self.generated)
        same = (self.segment[:, 1:] == self.segment[:, :-1]) & (self.segment[:, 1:] > 0)
        marks[:, :-1] = self.generated[:, 1:] & same
        return marks

    def with_inputs(self, **changes: Any) -> ProbeBatch:
        """Return the batch with other inputs; None removes one."""
        inputs = {key: value for key, value in {**self.inputs, **changes}.items() if value is not None}
        return replace(self, inputs=inputs)

    def samples(self) -> Iterator[tuple[int, int, int]]:
        """Yield (row, start, end) of every packed sample."""
        for row, segment in enumerate(self.segment.tolist()):
            for number in sorted(set(segment) - {0}):
                start = segment.index(number)
                yield row, start, start + segment.count(number)

    def cut(self, row: int, start: int, end: int) -> ProbeBatch:
        """Return tokens [start, end) of one row as a batch of their own, with the images they hold.

        Raises CannotSlice for inputs of unknown layout.
        """
        inputs: dict[str, Any] = {}
        for key, value in self.inputs.items():
            if key in TOKEN_KEYS:
                inputs[key] = _cut_tokens(value, row, start, end)
            elif key in PATCH_KEYS:
                continue
            elif isinstance(value, torch.Tensor) and value.dim():
                raise CannotSlice(f"the batch holds '{key}' of unknown layout, so samples cannot be cut out of it")
            else:
                inputs[key] = value
        inputs |= self._cut_images(row, start, end)
        window = (slice(row, row + 1), slice(start, end))
        place = f"row {row}, tokens {start}..{end - 1}"
        return replace(self, inputs=inputs, segment=self.segment[window], generated=self.generated[window], place=place)

    def padded(self, left: int, right: int, pad_id: int) -> ProbeBatch:
        """Return the batch with padding on either side and a 2-D attention mask. 4-D masks cannot be padded."""
        pads = {"input_ids": pad_id, "labels": IGNORE, "instance": -1}
        inputs = {
            key: F.pad(value, (left, right), value=pads.get(key, 0)) if key in TOKEN_KEYS else value
            for key, value in self.inputs.items()
        }
        real = torch.ones_like(self.ids) if "attention_mask" not in self.inputs else self.inputs["attention_mask"]
        inputs["attention_mask"] = F.pad(real, (left, right))
        segment, generated = (F.pad(x, (left, right)) for x in (self.segment, self.generated))
        return replace(self, inputs=inputs, segment=segment, generated=generated)

    def _cut_images(self, row: int, start: int, end: int) -> dict[str, Any]:
        given = {key: self.inputs[key] for key in PATCH_KEYS if key in self.inputs}
        if not given:
            return {}
        if self.image_id is None:
            raise CannotSlice("the batch holds images, but the image token id is unknown: set config.image_token_id")
        begins = self._image_starts(self.image_id)
        in_row, own = int(begins[row, :start].sum()), int(begins[row, start:end].sum())
        if not own:
            return {}
        first = int(begins[:row].sum()) + in_row
        return _take_images(given, int(begins.sum()), first, first + own, (row, in_row))

    def _image_starts(self, image_id: int) -> torch.Tensor:
        """Mark the first token of every image, bool[B, T]; without ``instance`` each run of the id is one image."""
        instance = self.inputs.get("instance")
        image = self.ids == image_id if instance is None else instance >= 0
        same = image[:, :-1] if instance is None else instance[:, 1:] == instance[:, :-1]
        starts = image.clone()
        starts[:, 1:] &= ~same
        return starts


def _generated_from_labels(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the supervised tokens; labels either repeat the ids or are the ids shifted left by one."""
    trained = labels != IGNORE
    in_place = int((trained & (labels == ids)).sum())
    ahead = int((trained[:, :-1] & (labels[:, :-1] == ids[:, 1:])).sum())
    if in_place >= ahead:
        return trained
    return torch.cat([torch.zeros_like(trained[:, :1]), trained[:, :-1]], dim=1)


def _segments(inputs: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    if "segment" in inputs:
        given: torch.Tensor = inputs["segment"]
        return given.long()
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    segment = torch.ones_like(ids)
    if positions is not None:
        plane = positions[0] if positions.dim() == 3 else positions
        restarts = torch.zeros_like(plane)
        restarts[:, 1:] = (plane[:, 1:] == 0) | (plane[:, 1:] < plane[:, :-1])
        segment = (1 + restarts.cumsum(1)).expand_as(ids)
    if mask is not None and mask.dim() == 2:
        segment = torch.where(mask.bool(), segment, 0)
    return segment


def _cut_tokens(value: torch.Tensor, row: int, start: int, end: int) -> torch.Tensor:
    if value.dim() == 4:  # a mask [B, 1, T, T]
        own = value[row : row + 1] if value.shape[0] > 1 else value
        return own[..., start:end, start:end]
    if value.dim() == 3:  # positions [planes, B, T]
        return value[:, row : row + 1, start:end]
    return value[row : row + 1, start:end]


def _take_images(
    given: Mapping[str, torch.Tensor], total: int, first: int, last: int, in_row: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return images [first, last) of ``total``; ``in_row`` is the row and the first image's number in it."""
    taken = {}
    tiled = "image_sizes" in given  # pixels [images, tiles, ...], not [rows, images, ...]
    grid = given.get("image_grid_thw")
    patches = None if grid is None else F.pad(grid.prod(1).cumsum(0), (1, 0)).tolist()
    for key, value in given.items():
        if key == "pixel_values" and patches is not None:
            taken[key] = value[patches[first] : patches[last]]
        elif key == "pixel_attention_mask" or (key == "pixel_values" and value.dim() == 5 and not tiled):
            row, begin = in_row
            taken[key] = value[row : row + 1, begin : begin + last - first]
        elif value.shape[0] == total:
            taken[key] = value[first:last]
        else:
            raise CannotSlice(f"'{key}' holds {value.shape[0]} entries, but the batch has {total} images")
    return taken
