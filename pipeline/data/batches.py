"""Builds the micro-batches of each step from the packs, ahead of time, in background threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from data_prep.common.supervision import predicts_target
from data_prep.images.store import ImageStore
from data_prep.media.spec import NativeImages, extents
from data_prep.packs import PackReader, PackRow
from pipeline.attention import build_plan
from pipeline.data.images import ImageLoader, images_of
from pipeline.data.order import BatchOrder
from pipeline.masks import Policy, Sidecars, position_ids
from pipeline.model.inputs import IGNORE, StageInputs
from pipeline.model.patches import PatchLayout
from pipeline.model.preprocess import Preprocess, stacked

MAX_DEFAULT_THREADS = 16
"""More threads wait for Python's lock, which decoding and resizing release and the rest of a batch does not."""

_Asked = TypeVar("_Asked")
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, with the step's counts."""

    microbatches: tuple[StageInputs, ...]
    rows: range
    """Rows of the global batch."""
    targets: int
    """Supervised tokens of the global batch, over all data-parallel ranks; the loss is divided by this count."""
    tokens: int
    """Tokens of this data-parallel rank, padding excluded."""
    images: int
    """Images of this data-parallel rank."""
    media_tokens: int = 0
    """Image tokens of this data-parallel rank."""


def default_threads(cores: int) -> int:
    """Return the decode threads of a rank with so many cores: one core is left to training."""
    return max(1, min(MAX_DEFAULT_THREADS, cores - 1))


def shifted_labels(row: PackRow) -> torch.Tensor:
    """Return int64[L]: the supervised token each position predicts, or IGNORE."""
    following = np.roll(row.input_ids.astype(np.int64), -1)
    return torch.from_numpy(np.where(predicts_target(row.segment, row.generated), following, IGNORE))


def stage_inputs(
    rows: list[PackRow], policy: Policy, pixels: torch.Tensor | None, extra_pixels: tuple[torch.Tensor, ...] = ()
) -> StageInputs:
    """Join rows into one sequence of T tokens and build the stage inputs on the CPU.

    Args:
        rows: of one micro-batch, at least one.
        policy: mask policy of the attention plan.
        pixels: uint8[n_views, 3, S, S] of the rows' images in order, an image being one view or several; None on
            stages without the vision tower.
        extra_pixels: the same for each further tower.

    Raises:
        UserError: the sidecars of a row are damaged, or an image does not fit the policy's grid.
    """
    sidecars = Sidecars.concat([Sidecars.from_row(row) for row in rows])
    labels = torch.cat([shifted_labels(row) for row in rows])
    return StageInputs(
        input_ids=torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64)),
        position_ids=position_ids(sidecars, policy.grid),
        plan=build_plan(policy, sidecars),
        labels=labels,
        image_positions=torch.nonzero(sidecars.instance >= 0).squeeze(1),
        pixels=pixels,
        extra_pixels=extra_pixels,
        supervised=(labels != IGNORE).nonzero().squeeze(1),
    )


def pinned(inputs: StageInputs) -> StageInputs:
    """Return a micro-batch in page-locked memory, so its copy to the GPU can overlap with computation."""
    layout = None if inputs.layout is None else inputs.layout.pin_memory()
    return replace(inputs.mapped(torch.Tensor.pin_memory), plan=inputs.plan.pin_memory(), layout=layout)


def to_device(inputs: StageInputs, device: torch.device) -> StageInputs:
    """Return a micro-batch on ``device``; the copy is asynchronous if the memory is pinned."""
    if device.type == "cpu":
        return inputs
    moved = inputs.mapped(partial(torch.Tensor.to, device=device, non_blocking=True))
    layout = None if inputs.layout is None else inputs.layout.to(device)
    return replace(moved, plan=inputs.plan.to(device), layout=layout)


class BatchSource:
    """Yields one `StepBatch` per step, prefetched by threads; the step number is its only state."""

    def __init__(
        self,
        packs: PackReader,
        *,
        order: BatchOrder,
        dp_rank: int,
        policy: Policy,
        preprocess: Sequence[Preprocess],
        threads: int,
        ahead: int,
        draft: bool = False,
    ) -> None:
        """Open the image store of a pack folder.

        Args:
            packs: the rows.
            order: which rows each rank takes.
            dp_rank: data-parallel index of this rank.
            policy: mask policy of the attention plans.
            preprocess: preprocessing of each vision tower; none on stages without them, which read no images.
            threads: threads that decode images, beside those that build batches; 0 loads in the calling thread.
            ahead: steps to prefetch.
            draft: decode JPEGs at a reduced size, see ``decode_rgb``.

        Raises:
            UserError: the image store is missing or damaged.
        """
        self._packs, self._order, self._dp_rank, self._policy = packs, order, dp_rank, policy
        store = packs.manifest.image_store
        self._reads_images = bool(preprocess)
        opens = self._reads_images and store is not None
        self._spec = packs.manifest.media_spec
        self._images = (
            ImageLoader(ImageStore(packs.directory / store), preprocess, draft, self._spec) if opens else None
        )
        self._ahead = max(1, ahead)
        self._pool = self._decoders = None
        if threads:
            # Two pools: a batch waits for its images, which would never be decoded if batches held all the threads.
            self._pool = ThreadPoolExecutor(min(threads, self._ahead), thread_name_prefix="batches")
            self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="images")

    def steps(self, first: int, last: int) -> Iterator[StepBatch]:
        """Yield the batches of steps ``first .. last - 1``, counted from 0. Raises UserError as :meth:`read` does."""
        return self._prefetched(self.read, range(first, last))

    def rows(self, groups: Iterable[Sequence[int]]) -> Iterator[list[StageInputs]]:
        """Yield a micro-batch of each row, by number, group by group. Raises UserError as :meth:`read` does."""
        return self._prefetched(lambda group: [self._microbatch([self._packs[index]]) for index in group], groups)

    def _prefetched(self, read: Callable[[_Asked], _Read], asked: Iterable[_Asked]) -> Iterator[_Read]:
        """Yield what ``read`` returns for each, in order, read by the threads."""
        if self._pool is None:
            yield from map(read, asked)
            return
        waiting: deque[Future[_Read]] = deque()
        for each in asked:
            waiting.append(self._pool.submit(read, each))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def read(self, step: int) -> StepBatch:
        """Build the micro-batches of one step. Raises UserError naming the image that cannot be decoded."""
        size = self._order.global_batch_size
        consumed = step % (len(self._packs) // size) * size  # another pass begins again at the first row
        microbatches, tokens, images, media_tokens = [], 0, 0, 0
        for number in range(self._order.microbatches):
            rows = [self._packs[i] for i in self._order.rows_of_microbatch(consumed, self._dp_rank, number)]
            microbatches.append(self._microbatch(rows))
            media_tokens += microbatches[-1].image_positions.numel()
            tokens += sum(int(np.count_nonzero(row.segment)) for row in rows)
            images += sum(len(row.image_row) for row in rows)
        all_rows = self._order.global_rows(consumed)
        targets = sum(self._packs.n_target(i) for i in all_rows)
        return StepBatch(tuple(microbatches), all_rows, targets, tokens, images, media_tokens)

    def inputs(self, rows: list[PackRow]) -> StageInputs:
        """Return rows as one micro-batch, with their pixels. Raises UserError as :meth:`read` does."""
        pixels = self._pixels(rows)
        inputs = stage_inputs(rows, self._policy, pixels[0] if pixels else None, tuple(pixels[1:]))
        if not pixels or not isinstance(self._spec.image, NativeImages):
            return inputs
        grids = [extent.view for row in rows if row.media is not None for extent in extents(row.media)]
        return replace(inputs, layout=PatchLayout.of(grids, self._spec.image.merge))

    def _microbatch(self, rows: list[PackRow]) -> StageInputs:
        return pinned(self.inputs(rows)) if torch.cuda.is_available() else self.inputs(rows)

    def _pixels(self, rows: list[PackRow]) -> list[torch.Tensor]:
        """Return the pixels of the rows' images for each tower."""
        if not self._reads_images or not any(len(row.image_row) for row in rows):
            return []
        assert self._images is not None, "rows with images, but the packs name no image store"
        spread = map if self._decoders is None else self._decoders.map
        loaded = spread(self._images.load, images_of(rows))
        return [stacked([*itertools.chain.from_iterable(of_tower)]) for of_tower in zip(*loaded, strict=True)]

    def close(self) -> None:
        """Stop the loader threads."""
        for pool in (self._pool, self._decoders):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
