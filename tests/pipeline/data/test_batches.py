"""Which rows a rank trains on, the content of its micro-batches, and the target of each position."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.common.errors import UserError
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.packs import PackReader, PackRow
from pipeline.data import images
from pipeline.data.batches import BatchSource, StepBatch, default_threads, shifted_labels, to_device
from pipeline.data.order import BatchOrder
from pipeline.masks import get_policy
from pipeline.model.inputs import IGNORE
from pipeline.model.preprocess import Preprocess
from tests.data_prep.images.test_store import photo


@pytest.fixture(scope="module")
def packs(small_demo: Path) -> PackReader:
    return PackReader(small_demo / "packs/sft")


def source(
    packs: PackReader, *, dp: int = 1, dp_rank: int = 0, threads: int = 0, with_images: bool = True
) -> BatchSource:
    return BatchSource(
        packs, order=BatchOrder(8, dp, 2), dp_rank=dp_rank, policy=get_policy("mma"),
        preprocess=[Preprocess(48)] if with_images else (), threads=threads, ahead=2,
    )  # fmt: skip


def oracle_labels(row: PackRow) -> list[int]:
    """The target of each position, computed token by token."""
    labels = [IGNORE] * len(row.segment)
    for t in range(len(labels) - 1):
        if row.segment[t + 1] != 0 and row.segment[t + 1] == row.segment[t] and row.generated[t + 1] == 1:
            labels[t] = int(row.input_ids[t + 1])
    return labels


@pytest.mark.parametrize("index", range(3))
def test_labels_are_the_next_generated_token_of_the_same_sample(index: int, packs: PackReader) -> None:
    row = packs[index]
    labels = shifted_labels(row)
    assert labels.tolist() == oracle_labels(row)
    assert int((labels != IGNORE).sum()) == row.n_target == packs.n_target(index)


@pytest.mark.parametrize(("dp", "microbatches"), list(product([1, 2, 3], [1, 2, 4])))
def test_every_row_of_a_step_is_trained_once_on_any_grid(dp: int, microbatches: int) -> None:
    order = BatchOrder(24, dp, microbatches)
    shares = [
        order.rows_of_microbatch(48, dp_rank, microbatch) for dp_rank in range(dp) for microbatch in range(microbatches)
    ]
    assert [row for share in shares for row in share] == list(order.global_rows(48)) == list(range(48, 72))


def contents(batch: StepBatch) -> list[torch.Tensor]:
    fields = ("input_ids", "position_ids", "labels", "image_positions", "pixels", "supervised")
    return [getattr(microbatch, name) for microbatch in batch.microbatches for name in fields]


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_read_the_same_batches_in_the_same_order(threads: int, packs: PackReader) -> None:
    alone, threaded = source(packs), source(packs, threads=threads)
    try:
        pairs = list(zip(alone.steps(1, 8), threaded.steps(1, 8), strict=True))
    finally:
        threaded.close()
    assert [batch.rows.start for batch, _ in pairs] == [8 * step for step in range(1, 8)]
    for ours, theirs in pairs:
        assert all(map(torch.equal, contents(ours), contents(theirs)))


def test_data_parallel_ranks_share_a_step_and_agree_on_its_targets(packs: PackReader) -> None:
    whole = source(packs).read(2)
    halves = [source(packs, dp=2, dp_rank=dp_rank).read(2) for dp_rank in range(2)]
    assert [half.targets for half in halves] == [whole.targets] * 2
    assert sum(half.tokens for half in halves) == whole.tokens
    assert sum(half.images for half in halves) == whole.images
    labels = torch.cat([microbatch.labels for half in halves for microbatch in half.microbatches])
    assert torch.equal(labels, torch.cat([microbatch.labels for microbatch in whole.microbatches]))
    assert int((labels != IGNORE).sum()) == whole.targets


def test_a_stage_without_the_tower_reads_no_image(packs: PackReader) -> None:
    for microbatch, other in zip(
        source(packs, with_images=False).read(0).microbatches, source(packs).read(0).microbatches, strict=True
    ):
        assert microbatch.pixels is None and other.pixels is not None
        assert torch.equal(microbatch.input_ids, other.input_ids)
        assert len(other.pixels) * packs.manifest.image_tokens == len(other.image_positions)


def test_a_micro_batch_moves_with_all_its_tensors(packs: PackReader) -> None:
    """Every tensor reaches the device, including the plan's; absent tensors stay absent."""
    for shown in (True, False):
        microbatch = source(packs, with_images=shown).read(0).microbatches[0]
        moved = to_device(microbatch, torch.device("meta"))
        assert torch.equal(microbatch.supervised, torch.nonzero(microbatch.labels != IGNORE).squeeze(1))
        for name in ("input_ids", "position_ids", "labels", "image_positions", "supervised"):
            assert getattr(moved, name).is_meta and getattr(moved, name).shape == getattr(microbatch, name).shape
        assert moved.plan.device.type == "meta"
        assert (moved.pixels is None) == (microbatch.pixels is None) == (not shown)
        assert moved.pixels is None or moved.pixels.is_meta


def test_pixels_are_bytes_resized_from_the_images_of_the_rows(packs: PackReader) -> None:
    store = ImageStore(packs.directory / packs.manifest.image_store)
    shown = [decode_rgb(store.read(index)) for row in range(4) for index in packs[row].image_row.tolist()]
    pixels = source(packs).read(0).microbatches[0].pixels
    assert pixels is not None and pixels.dtype == torch.uint8
    assert torch.equal(Preprocess(48).normalize(pixels), Preprocess(48).batch(shown))


@pytest.mark.parametrize(("kept", "side"), [(None, 160), ((0, 0, 0, 500, 1000), 320), ((1, 0, 0, 1000, 240), 640)])
def test_drafts_are_large_enough_for_what_a_crop_keeps(
    kept: tuple[int, ...] | None, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store:
        def read(self, row: int) -> bytes:
            return photo(640, 640)

    seen: list[tuple[int, int]] = []
    real = Preprocess.resize
    monkeypatch.setattr(images, "apply_augmentation", lambda image, _: image)
    monkeypatch.setattr(Preprocess, "resize", lambda own, image: (seen.append(image.size), real(own, image))[1])
    loader = images.ImageLoader(Store(), [Preprocess(48), Preprocess(150)], draft=True)  # type: ignore[arg-type]
    augmentation = None if kept is None else np.array(kept, dtype=np.int16)
    assert [one.shape[1:] for one in loader.load(images.ImageReference(0, augmentation))] == [
        (48, 48, 3),
        (150, 150, 3),
    ]
    assert seen == [(side, side)] * 2


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 7), (96, 16)])
def test_decode_threads_leave_a_core_to_training(cores: int, threads: int) -> None:
    assert default_threads(cores) == threads


def test_an_image_that_does_not_decode_is_named_with_threads_too(packs: PackReader) -> None:
    threaded = source(packs, threads=2)
    threaded._images = replace(threaded._images, store=SimpleNamespace(read=lambda row: b"GIF89a"))  # type: ignore
    try:
        with pytest.raises(UserError, match=r"image \d+ of the image store cannot be decoded .* mma-prep verify"):
            next(threaded.steps(0, 4))
    finally:
        threaded.close()


def test_another_pass_begins_at_the_first_row(packs: PackReader) -> None:
    own, steps = source(packs), len(packs) // 8
    first, again = own.read(0), own.read(steps)
    assert first.rows == again.rows == range(8) and first.targets == again.targets
    assert torch.equal(first.microbatches[0].input_ids, again.microbatches[0].input_ids)
    assert own.read(2 * steps - 1).rows.stop == 8 * steps, "the rest of a pass, less than a batch, is left out"
