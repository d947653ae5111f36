"""The sidecars of a Hugging Face batch, read from what a model is called with.

B rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_prep.common.errors import UserError
from data_prep.common.modalities import IMAGE, TEXT, VIDEO
from pipeline.masks import Sidecars

IGNORE = -100
_IMAGE_NAMES = ("image_token_id", "image_token_index")
_VIDEO_NAMES = ("video_token_id", "video_token_index")
_LENGTH_NAMES = ("mm_tokens_per_image", "image_seq_length")
_GRIDS = {IMAGE: "image_grid_thw", VIDEO: "video_grid_thw"}


@dataclass(frozen=True)
class AssistantSpans:
    """How a chat template marks what the model writes, in token ids."""

    start: tuple[int, ...]
    """The assistant header, for example the ids of ``<|im_start|>assistant\\n``; the next token is generated."""
    end: tuple[int, ...]
    """Ids that end a turn, for example ``<|im_end|>``; they are generated, too."""

    def generated(self, ids: Sequence[int]) -> list[bool]:
        """Mark the generated tokens of one row."""
        marks, inside, header = [], False, len(self.start)
        for place, token in enumerate(ids):
            marks.append(inside)
            opens = tuple(ids[max(0, place + 1 - header) : place + 1]) == self.start
            inside = token not in self.end if inside else opens
        return marks


@dataclass(frozen=True)
class Media:
    """How a model's config marks media."""

    tokens: Mapping[int, int]
    """Placeholder id -> modality."""
    lengths: int | None = None
    """Tokens of one image where all have as many; else None."""
    merge: int = 1
    """Patches merged into one token, per side, where batches hold grids."""

    def modality(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the modality of each token, int64 of the shape of ``ids``."""
        return torch.stack([(ids == token) * kind for token, kind in self.tokens.items()]).sum(0)

    @classmethod
    def of(cls, config: Any) -> Media:
        """Read a model's config. Raises UserError when it names no image token."""
        ids = {_first(config, _VIDEO_NAMES): VIDEO, _first(config, _IMAGE_NAMES): IMAGE}
        ids.pop(None, None)
        if IMAGE not in ids.values():
            raise UserError(
                f"{type(config).__name__} names no image_token_id, so the images of a batch cannot be found: "
                "enable MMA on a vision-language model, or set config.image_token_id"
            )
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        # Images that are cut into tiles have as many tokens as their tiles need.
        lengths = None if getattr(config, "image_grid_pinpoints", None) else _first(config, _LENGTH_NAMES)
        return cls({int(key): value for key, value in ids.items() if key is not None}, lengths, merge)


@dataclass
class BatchReader:
    """Turns the arguments of a forward call into one ``Sidecars`` per row."""

    media: Media
    spans: AssistantSpans | None = None
    own: tuple[str, ...] = field(default=("segment", "generated"), init=False)
    """Arguments that the reader takes away from the model's forward."""

    def read(self, call: Mapping[str, Any], *, training: bool) -> list[Sidecars]:
        """Return the rows' sidecars, on the CPU.

        Args:
            call: the arguments of forward. ``segment`` int[B, T] and ``generated`` bool[B, T] are optional; otherwise
                samples come from ``cu_seq_lens_q``, or from restarts of ``position_ids`` and a 2-D ``attention_mask``
                (0 = padding; values above 1 number the packed samples), and generated tokens from the assistant spans
                or ``labels``.
            training: refuse batches that do not say which tokens are generated. At inference all of them count as a
                prompt, but ``use_cache=False`` is refused: ``generate`` would pass its own tokens as a prompt.

        Raises:
            UserError: ids are missing, a batch does not say what is generated, or labels train a given token.
        """
        ids = call.get("input_ids")
        if ids is None:
            raise UserError("MMA finds images by their token id: call the model with input_ids, not inputs_embeds")
        ids = ids.cpu()
        modality = self.media.modality(ids)
        generated = self._generated(call, ids, training=training) & (modality == TEXT)
        segment = _segments(call, ids)
        generated &= segment > 0
        instance = self._instances(call, modality, segment)
        return [Sidecars(*(x[row].long() for x in (segment, modality, instance, generated))) for row in range(len(ids))]

    def _generated(self, call: Mapping[str, Any], ids: torch.Tensor, *, training: bool) -> torch.Tensor:
        labels: torch.Tensor | None = call.get("labels")
        trained = None if labels is None else labels.cpu().ne(IGNORE)
        found: torch.Tensor
        if call.get("generated") is not None:
            found = call["generated"].cpu().bool()
        elif self.spans is not None:
            found = torch.tensor([self.spans.generated(row) for row in ids.tolist()])
        elif trained is not None:
            return trained
        elif training or call.get("use_cache") is False:  # without a cache, generate() mixes prompt and answer
            raise UserError(
                "cannot tell answers from prompts: pass labels (-100 = prompt) or generated, set assistant_spans, or "
                "generate with a cache"
            )
        else:
            found = torch.zeros_like(ids, dtype=torch.bool)
        text = self.media.modality(ids) == TEXT
        if trained is not None and (wrong := trained & ~found & text).any():
            row, token = wrong.nonzero()[0].tolist()
            raise UserError(
                f"labels train token {token} of row {row}, which counts as given: images would see it before it is "
                "predicted; fix the assistant spans, or set its label to -100"
            )
        return found

    def _instances(self, call: Mapping[str, Any], modality: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        """Number the media of each row from 0: runs of one modality, cut by grids or by the tokens of one image."""
        queues = {kind: self._grid_lengths(call, kind) for kind in (IMAGE, VIDEO)}
        instance = torch.full_like(modality, -1)
        for row, kinds in enumerate(modality.tolist()):
            number, place, segments = 0, 0, segment[row].tolist()
            while place < len(kinds):
                end = place
                while end < len(kinds) and kinds[end] == kinds[place] and segments[end] == segments[place]:
                    end += 1
                if kinds[place] != TEXT:
                    for length in self._cut(end - place, queues[kinds[place]]):
                        instance[row, place : place + length] = number
                        number, place = number + 1, place + length
                place = end
        return instance

    def _cut(self, run: int, queue: list[int]) -> list[int]:
        """Return the lengths of the media in a run of media tokens."""
        lengths: list[int] = []
        while queue and sum(lengths) + queue[0] <= run:
            lengths.append(queue.pop(0))
        if sum(lengths) == run:
            return lengths
        each = self.media.lengths
        return [each] * (run // each) if each and run % each == 0 else [run]

    def _grid_lengths(self, call: Mapping[str, Any], kind: int) -> list[int]:
        grid = call.get(_GRIDS[kind])
        return [] if grid is None else (grid.prod(1) // self.media.merge**2).tolist()


def _segments(call: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    if call.get("segment") is not None:
        given: torch.Tensor = call["segment"].cpu().long()
        return given
    segment = torch.ones_like(ids)
    mask, positions, bounds = (call.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if bounds is not None:  # the samples of one joined row, as for flash attention; positions need not restart
        return torch.bucketize(torch.arange(ids.shape[1]), bounds.cpu(), right=True)[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        segment = mask[:, -ids.shape[1] :].cpu().long()
        real = segment > 0
    if positions is not None and (positions.dim() == 2 or positions.shape[0] == 4):
        plane = (positions if positions.dim() == 2 else positions[0]).cpu().expand_as(ids)
        restarts = torch.zeros_like(ids)
        restarts[:, 1:] = ((plane[:, 1:] <= 0) | (plane[:, 1:] < plane[:, :-1])) & real[:, 1:] & real[:, :-1]
        segment = torch.where(real, segment + restarts.cumsum(1), 0)
    return segment


def _first(config: Any, names: Sequence[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value is not None), None)
