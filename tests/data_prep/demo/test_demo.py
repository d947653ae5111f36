"""The demo world: the same bytes every time, questions that need the picture, answers that the pixels confirm."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.corpora import build_corpus
from data_prep.demo import write_world
from data_prep.demo.draw import CELL_PX, GROUND, RGB
from data_prep.demo.scenes import FEWEST, MOST, draw_scenes
from data_prep.example import Example

SCENES, HELD_OUT = 1200, 400
CHANCE = {"colour": 1 / 4, "exist": 1 / 2, "count": 1 / 5}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, scenes=SCENES, held_out=HELD_OUT, seed=3)
    return out / "raw"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def vqa(raw: Path, split: str) -> list[tuple[int, str, str, str]]:
    """Return (image id, family, question, answer) of a split."""
    questions = json.loads((raw / f"vqav2/{split}_questions.json").read_text())["questions"]
    annotations = json.loads((raw / f"vqav2/{split}_annotations.json").read_text())["annotations"]
    known = {entry["question_id"]: entry for entry in annotations}
    return [
        (
            entry["image_id"],
            known[entry["question_id"]]["question_type"],
            entry["question"],
            known[entry["question_id"]]["multiple_choice_answer"],
        )
        for entry in questions
    ]


@given(seed=st.text(max_size=4), number=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_scenes_hold_their_cards_in_few_objects_and_distinct_cells(seed: str, number: int) -> None:
    scenes = list(draw_scenes(number, seed))
    assert len(scenes) == number
    for scene in scenes:
        assert FEWEST <= len(scene.things) <= MOST
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        assert [card.family for card in scene.cards] == list(CHANCE)
        assert all(card.answer == answer_from(scene.caption(), card.question) for card in scene.cards)


@pytest.mark.slow
def test_the_bytes_depend_on_the_seed_and_not_on_the_number_of_workers(tmp_path: Path) -> None:
    for name, seed, workers in (("one", 5, 1), ("three", 5, 3), ("other", 6, 1)):
        write_world(tmp_path / name, scenes=1050, held_out=10, seed=seed, workers=workers)
    one, three, other = (hashes(tmp_path / name) for name in ("one", "three", "other"))
    assert one == three
    assert one.keys() == other.keys()
    differing = {name for name in one if one[name] != other[name]}
    assert "raw/captions/00000.tar" in differing
    assert "raw/vqav2/val_questions.json" in differing


def test_a_second_call_changes_nothing_and_another_world_is_refused(raw: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    write_world(raw.parent, scenes=SCENES, held_out=HELD_OUT, seed=3)
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before
    with pytest.raises(UserError, match="already holds the world"):
        write_world(raw.parent, scenes=SCENES, held_out=HELD_OUT, seed=4)


def test_an_incomplete_world_is_drawn_again_and_other_files_are_untouched(tmp_path: Path) -> None:
    (tmp_path / ".raw.partial").mkdir()
    (tmp_path / ".raw.partial/left_over").write_text("by a killed process")
    write_world(tmp_path, scenes=3, held_out=1)
    assert not (tmp_path / ".raw.partial").exists()
    assert not (tmp_path / "raw/left_over").exists()
    (tmp_path / "mine/raw").mkdir(parents=True)
    with pytest.raises(UserError, match="not a demo world"):
        write_world(tmp_path / "mine", scenes=3, held_out=1)


@pytest.mark.parametrize("numbers", [{"scenes": 0}, {"held_out": 0}, {"workers": 0}])
def test_sizes_out_of_range_are_named(numbers: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(numbers))}=0"):
        write_world(tmp_path, **numbers)


@pytest.mark.parametrize("family", CHANCE)
def test_a_guesser_that_reads_only_the_question_stays_at_chance(family: str, raw: Path) -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, kind, question, answer in vqa(raw, "train"):
        if kind == family:
            answers[question][answer] += 1
    held_out = [(question, answer) for _, kind, question, answer in vqa(raw, "val") if kind == family]
    right = sum(answers[question].most_common(1)[0][0] == answer for question, answer in held_out)
    assert len(held_out) == HELD_OUT
    assert right / len(held_out) == pytest.approx(CHANCE[family], abs=0.03)


@pytest.mark.parametrize("split", ["train", "val"])
def test_within_every_question_all_answers_come_equally_often(split: str, raw: Path) -> None:
    answers: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, family, question, answer in vqa(raw, split):
        answers[family, question][answer] += 1
    for (family, question), counts in answers.items():
        assert len(counts) == round(1 / CHANCE[family]), question
        assert max(counts.values()) - min(counts.values()) <= 2, (question, counts)


def parse_caption(caption: str) -> dict[int, tuple[str, str, str]]:
    """Return cell -> (size, colour, shape)."""
    things = {}
    for part in caption.split("; "):
        match = re.fullmatch(r"row (\d) column (\d): a (\w+) (\w+) (\w+)", part)
        assert match is not None, part
        row, column, size, colour, shape = match.groups()
        things[4 * (int(row) - 1) + int(column) - 1] = (size, colour, shape)
    return things


def answer_from(caption: str, question: str) -> str:
    """Answer from the caption, without the generator's code."""
    things = list(parse_caption(caption).values())
    if match := re.fullmatch(r"what colour is the (\w+) (\w+)\?", question):
        [colour] = [colour for size, colour, shape in things if (size, shape) == match.groups()]
        return colour
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        colour, shape = match.groups()
        assert colour in {thing[1] for thing in things}, "a scene answering no still holds the colour"
        assert shape in {thing[2] for thing in things}, "a scene answering no still holds the shape"
        return "yes" if (colour, shape) in {thing[1:] for thing in things} else "no"
    match = re.fullmatch(r"how many (\w+) (\w+)s are there\?", question)
    assert match is not None, question
    return str([thing[1:] for thing in things].count((match[1], match[2])))


def captions(raw: Path) -> list[tuple[str, bytes]]:
    """Return (caption, image bytes) in order of image id."""
    corpus = build_corpus("webdataset", {"tars": "captions/*.tar"}, raw)
    found = []
    for example in (item for shard in corpus.shards() for item in corpus.examples(shard)):
        assert isinstance(example, Example)
        words = example.turns[1].parts[0]
        assert isinstance(words, str)
        found.append((words, example.images[0].read()))
    return found


def test_every_answer_follows_from_the_caption_and_tars_hold_the_same_images(raw: Path) -> None:
    described = captions(raw)
    assert len(described) == SCENES
    for image_id, _, question, answer in vqa(raw, "train"):
        assert answer_from(described[image_id - 1][0], question) == answer
    for image_id in (1, SCENES):
        file = raw / f"images/train/COCO_train2014_{image_id:012d}.jpg"
        assert file.read_bytes() == described[image_id - 1][1]


def test_the_pixels_show_what_the_caption_says(raw: Path) -> None:
    names, palette = list(RGB), np.array(list(RGB.values()), dtype=np.float32)
    for caption, data in captions(raw)[:300]:
        pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
        assert pixels.shape == (48, 48, 3)
        things = parse_caption(caption)
        for cell in range(16):
            row, column = divmod(cell, 4)
            patch = pixels[row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX]
            is_lit = np.abs(patch - np.array(GROUND)).max(axis=2) > 50
            lit = patch[is_lit]
            if cell not in things:  # a neighbour may reach in by a shifted edge
                assert len(lit) <= 12
                continue
            size, colour, _ = things[cell]
            nearest = np.abs(lit[:, None] - palette).sum(axis=2).argmin(axis=1)
            assert names[np.bincount(nearest).argmax()] == colour
            extent = max(np.ptp(axis) + 1 for axis in np.nonzero(is_lit))
            assert (extent > 7.5) == (size == "big")


def test_held_out_scenes_are_not_among_the_training_scenes(raw: Path) -> None:
    train, val = ({path.read_bytes() for path in (raw / f"images/{split}").iterdir()} for split in ("train", "val"))
    assert len(val) == HELD_OUT
    assert not train & val


READERS: list[tuple[str, dict[str, Any], int]] = [
    ("webdataset", {"tars": "captions/*.tar"}, SCENES),
    (
        "vqav2",
        {
            "questions": "vqav2/train_questions.json",
            "annotations": "vqav2/train_annotations.json",
            "images": "images/train",
        },
        3 * SCENES,
    ),
    (
        "vqav2",
        {
            "questions": "vqav2/val_questions.json",
            "annotations": "vqav2/val_annotations.json",
            "images": "images/val",
            "image_prefix": "COCO_val2014_",
        },
        3 * HELD_OUT,
    ),
    ("llava", {"conversations": "llava/llava_instruct.json", "images": "images/train"}, SCENES // 4),
]


@pytest.mark.parametrize(("kind", "options", "expected"), READERS)
def test_the_readers_accept_every_row(kind: str, options: dict[str, Any], expected: int, raw: Path) -> None:
    corpus = build_corpus(kind, options, raw)
    items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
    assert len(items) == expected
    assert all(isinstance(item, Example) for item in items)


def test_each_expression_singles_out_the_object_in_its_box(raw: Path) -> None:
    described = captions(raw)
    table = json.loads((raw / "refcoco/finetune_refcoco_train.json").read_text())
    assert len(table["images"]) == len(table["annotations"]) > 0.9 * SCENES
    for image, annotation in zip(table["images"], table["annotations"], strict=True):
        things = parse_caption(described[image["original_id"] - 1][0])
        x, y, width, height = annotation["bbox"]
        cell = 4 * int((y + height / 2) // CELL_PX) + int((x + width / 2) // CELL_PX)
        assert image["caption"] == "the " + " ".join(things[cell])
        assert list(things.values()).count(things[cell]) == 1
