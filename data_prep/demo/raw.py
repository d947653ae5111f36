"""Scenes in the official raw formats: webdataset captions, VQAv2, RefCOCO (MDETR's COCO format) and LLaVA."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.demo.draw import SIDE_PX, bounding_box, encode
from data_prep.demo.scenes import Scene

ANSWER_TYPES = {"colour": "other", "exist": "yes/no", "count": "number"}
ANNOTATORS = 10  # VQAv2 publishes ten answers per question
SCENES_PER_CONVERSATION = 4
DESCRIBE = "what is in the picture?"


class Split(NamedTuple):
    """A split's names in paths and its first image id (ids are unique over both splits, as in COCO)."""

    name: str
    coco_name: str
    first_id: int

    def image_id(self, index: int) -> int:
        """Return the image id of the scene at ``index``."""
        return self.first_id + index

    def file_name(self, index: int) -> str:
        """Return the COCO file name of the scene at ``index``."""
        return f"COCO_{self.coco_name}_{self.image_id(index):012d}.jpg"


TRAIN = Split("train", "train2014", 1)
VAL = Split("val", "val2014", 500_000_001)


def write_json(path: Path, content: object) -> None:
    """Write compact JSON, deterministic to the byte."""
    path.write_text(json.dumps(content, separators=(",", ":")))


def write_images(folder: Path, split: Split, first: int, scenes: Sequence[Scene]) -> list[bytes]:
    """Write the scenes ``first, first + 1, ...`` as image files and return their bytes."""
    pictures = [encode(scene) for scene in scenes]
    for index, picture in enumerate(pictures, first):
        (folder / split.file_name(index)).write_bytes(picture)
    return pictures


def write_captions(path: Path, first: int, scenes: Sequence[Scene], pictures: Sequence[bytes]) -> None:
    """Write one webdataset tar in img2dataset's layout, without times or owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, (scene, picture) in enumerate(zip(scenes, pictures, strict=True), first):
            key, caption = f"{index:09d}", scene.caption()
            metadata = {"caption": caption, "key": key, "status": "success", "width": SIDE_PX, "height": SIDE_PX}
            for suffix, data in (
                ("jpg", picture),
                ("json", json.dumps(metadata).encode()),
                ("txt", caption.encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def vqav2(split: Split, scenes: Sequence[Scene]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of the questions and annotations files, joined by question_id, families interleaved."""
    questions, annotations = [], []
    for index, scene in enumerate(scenes):
        image_id = split.image_id(index)
        for number, card in enumerate(scene.cards):
            key = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**key, "question": card.question})
            annotations.append(
                {
                    **key,
                    "question_type": card.family,
                    "answer_type": ANSWER_TYPES[card.family],
                    "multiple_choice_answer": card.answer,
                    "answers": [
                        {"answer": card.answer, "answer_confidence": "yes", "answer_id": person}
                        for person in range(1, ANNOTATORS + 1)
                    ],
                }
            )
    head = {"data_type": "mscoco", "data_subtype": split.coco_name, "info": {"description": "drawn scenes"}}
    return (
        {**head, "task_type": "Open-Ended", "questions": questions},
        {**head, "annotations": annotations},
    )


def refcoco(split: Split, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return one referring expression per scene that holds an object with a unique look."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        candidates = scene.unique_things()
        if not candidates:
            continue
        thing = candidates[index % len(candidates)]
        box = bounding_box(thing)
        number = len(images)
        images.append(
            {
                "file_name": split.file_name(index),
                "height": SIDE_PX,
                "width": SIDE_PX,
                "id": number,
                "original_id": split.image_id(index),
                "caption": f"the {thing.look}",
                "dataset_name": "refcoco",
            }
        )
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "category_id": 1,
                "tokens_positive": [[0, len(f"the {thing.look}")]],
            }
        )
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}


def llava(split: Split, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """Return a conversation about every fourth scene: its questions in random order, then a description."""
    conversations = []
    for index in range(0, len(scenes), SCENES_PER_CONVERSATION):
        scene, rng = scenes[index], random.Random(index)
        asked = [(card.question, card.answer) for card in rng.sample(scene.cards, len(scene.cards))]
        turns = []
        for question, answer in [*asked, (DESCRIBE, scene.caption())]:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        # The marker is before or after the first question, as in the published file.
        first = turns[0]["value"]
        turns[0]["value"] = f"<image>\n{first}" if rng.random() < 0.5 else f"{first}\n<image>"
        conversations.append(
            {
                "id": f"{split.image_id(index):012d}",
                "image": split.file_name(index),
                "conversations": turns,
            }
        )
    return conversations
