"""What a batch says: media by their ids and grids, answers by spans, samples by positions, masks or numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.hf.rows import AssistantSpans, BatchReader, Media
from tests.pipeline.hf.models import CLASSES, IMAGE_ID, IMAGE_TOKENS, VIDEO_ID, tiny

IMG, VID = IMAGE_ID, VIDEO_ID


def columns(reader: BatchReader, **call: Any) -> tuple[list[int], list[int], list[int], list[int]]:
    (row,) = reader.read(call, training=False)
    found = (row.segment, row.modality, row.instance, row.generated)
    return tuple(column.tolist() for column in found)  # type: ignore[return-value]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_names_its_media(name: str) -> None:
    media = Media.of(tiny(name).config)
    assert media.tokens[IMAGE_ID] == 1
    assert media.tokens.get(VIDEO_ID) == (2 if name.startswith(("qwen", "llava_one")) else None)
    assert media.lengths in (None, IMAGE_TOKENS)


def test_touching_media_are_cut_by_their_grids() -> None:
    reader = BatchReader(Media({IMG: 1, VID: 2}, merge=2))
    ids = torch.tensor([[5, IMG, IMG, IMG, IMG, VID, VID, VID, VID, IMG, 6]])
    image_grid, video_grid = torch.tensor([[1, 2, 2], [1, 2, 6], [1, 2, 2]]), torch.tensor([[2, 2, 4]])
    call = {"input_ids": ids, "image_grid_thw": image_grid, "video_grid_thw": video_grid}
    _, modality, instance, _ = columns(reader, **call)
    assert modality == [0, 1, 1, 1, 1, 2, 2, 2, 2, 1, 0]
    assert instance == [-1, 0, 1, 1, 1, 2, 2, 2, 2, 3, -1]


def test_touching_images_are_cut_by_their_length_or_stay_one() -> None:
    ids = torch.tensor([[IMG, IMG, IMG, IMG, 5, IMG, IMG, IMG]])
    assert columns(BatchReader(Media({IMG: 1}, lengths=2)), input_ids=ids)[2] == [0, 0, 1, 1, -1, 2, 2, 2]
    assert columns(BatchReader(Media({IMG: 1})), input_ids=ids)[2] == [0, 0, 0, 0, -1, 1, 1, 1]


def test_spans_begin_after_the_header_and_hold_the_end() -> None:
    spans = AssistantSpans(start=(7, 8), end=(9,))
    assert spans.generated([7, 8, 1, 9, 8, 7, 7, 8, 2, 7, 8, 9]) == [
        False,
        False,
        *[True] * 2,
        *[False] * 4,
        *[True] * 4,
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"attention_mask": [0, 0, 1, 1, 1, 1]}, [0, 0, 1, 1, 1, 1]),
        ({"attention_mask": [1, 1, 1, 2, 2, 0]}, [1, 1, 1, 2, 2, 0]),
        ({"position_ids": [0, 1, 2, 0, 0, 1]}, [1, 1, 1, 2, 3, 3]),
        ({"position_ids": [1, 1, 0, 1, 2, 3], "attention_mask": [0, 0, 1, 1, 1, 1]}, [0, 0, 1, 1, 1, 1]),
        ({"position_ids": [0, 1, 0, 1, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]}, [1, 1, 2, 2, 0, 0]),
        ({"position_ids": [0, 1, 2, 3, 4, 5], "cu_seq_lens_q": [0, 2, 5, 6]}, [1, 1, 2, 2, 2, 3]),
        ({"segment": [4, 4, 4, 5, 5, 0], "position_ids": [0, 1, 0, 1, 0, 0]}, [4, 4, 4, 5, 5, 0]),
    ],
)
def test_samples(call: dict[str, list[int]], expected: list[int]) -> None:
    given = {key: torch.tensor(value if key == "cu_seq_lens_q" else [value]) for key, value in call.items()}
    reader = BatchReader(Media({IMG: 1}))
    assert columns(reader, input_ids=torch.arange(1, 7)[None], **given)[0] == expected


def test_three_planes_are_never_read_as_samples_and_four_are() -> None:
    reader, ids = BatchReader(Media({IMG: 1})), torch.arange(1, 7)[None]
    planes = torch.tensor([0, 1, 2, 0, 1, 2]).expand(4, 1, 6)
    assert columns(reader, input_ids=ids, position_ids=planes[:3])[0] == [1] * 6
    assert columns(reader, input_ids=ids, position_ids=planes)[0] == [1, 1, 1, 2, 2, 2]
