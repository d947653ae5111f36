"""Write the demo world as raw corpora, once per folder.

Layout of the output folder; every file is in the published format of the corpus it is named after::

    raw/world.json                                   settings; written last, so it marks a complete world
    raw/captions/00000.tar ...                       webdataset: KEY.jpg, KEY.txt, KEY.json (training scenes)
    raw/images/train/COCO_train2014_%012d.jpg        48 x 48 JPEG, the same bytes as in the tars
    raw/images/val/COCO_val2014_%012d.jpg            held-out scenes
    raw/vqav2/{train,val}_questions.json             VQAv2; question_type is the family: colour, exist, count
    raw/vqav2/{train,val}_annotations.json
    raw/refcoco/finetune_refcoco_train.json          MDETR's COCO format, one expression per scene
    raw/llava/llava_instruct.json                    multi-turn conversations about every fourth training scene
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.processes import worker_pool
from data_prep.demo import raw
from data_prep.demo.scenes import Scene, draw_scenes

FORMAT_VERSION = 2
SCENES_PER_TAR = 1000
MARKER = "world.json"


@dataclass(frozen=True, slots=True)
class World:
    """Settings that determine every byte of the world; the content of its marker file."""

    scenes: int
    held_out: int
    seed: int
    version: int = FORMAT_VERSION


def write_world(out: Path, *, scenes: int = 20_000, held_out: int = 600, seed: int = 0, workers: int = 1) -> None:
    """Draw the demo world into ``out/raw`` (layout: see the module), or return at once if it exists.

    Each scene has one question from each of the three families, so there are ``3 * scenes`` training questions, and
    ``held_out`` questions per family on separate scenes. The bytes depend only on the sizes and the seed, never on
    ``workers``. The folder is written atomically; only one call at a time may write to the same ``out``.

    Raises:
        UserError: a size is out of range, or ``out/raw`` holds something other than this world.
    """
    if min(scenes, held_out, workers) < 1:
        raise UserError(f"scenes={scenes}, held_out={held_out} and workers={workers} must each be at least 1")
    world = World(scenes, held_out, seed)
    final, partial_folder = out / "raw", out / ".raw.partial"
    if is_complete(final, world):
        return
    shutil.rmtree(partial_folder, ignore_errors=True)
    _write(partial_folder, world, workers)
    (partial_folder / MARKER).write_text(json.dumps(asdict(world)) + "\n")
    partial_folder.rename(final)


def is_complete(folder: Path, world: World) -> bool:
    """Return whether ``folder`` holds this world. Raises UserError if it holds anything else."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        found = None
    if found != asdict(world):
        what = f"the world {found}" if found else "files that are not a demo world"
        raise UserError(f"{folder} already holds {what}, not {asdict(world)}: remove it or choose another folder")
    return True


def _write(folder: Path, world: World, workers: int) -> None:
    """Draw both splits in a process pool while this process writes the JSON files."""
    train = list(draw_scenes(world.scenes, f"{world.seed}/train"))
    val = list(draw_scenes(world.held_out, f"{world.seed}/val"))
    for name in ("captions", "images/train", "images/val", "vqav2", "refcoco", "llava"):
        (folder / name).mkdir(parents=True)
    if workers == 1:
        for batch in _batches(train, val):
            _draw_batch(batch, folder=folder)
        _write_tables(folder, train, val)
        return
    with worker_pool(workers) as pool:
        drawn = pool.map(partial(_draw_batch, folder=folder), _batches(train, val))
        _write_tables(folder, train, val)
        for _ in drawn:  # raises a worker's exception
            pass


@dataclass(frozen=True, slots=True)
class _Batch:
    split: raw.Split
    first: int
    scenes: Sequence[Scene]


def _batches(train: Sequence[Scene], val: Sequence[Scene]) -> Iterator[_Batch]:
    for split, scenes in ((raw.TRAIN, train), (raw.VAL, val)):
        for first in range(0, len(scenes), SCENES_PER_TAR):
            yield _Batch(split, first, scenes[first : first + SCENES_PER_TAR])


def _draw_batch(batch: _Batch, *, folder: Path) -> None:
    """Write the image files of a batch and, for training scenes, its caption tar."""
    pictures = raw.write_images(folder / "images" / batch.split.name, batch.split, batch.first, batch.scenes)
    if batch.split == raw.TRAIN:
        tar = folder / "captions" / f"{batch.first // SCENES_PER_TAR:05d}.tar"
        raw.write_captions(tar, batch.first, batch.scenes, pictures)


def _write_tables(folder: Path, train: Sequence[Scene], val: Sequence[Scene]) -> None:
    for split, scenes in ((raw.TRAIN, train), (raw.VAL, val)):
        questions, annotations = raw.vqav2(split, scenes)
        raw.write_json(folder / "vqav2" / f"{split.name}_questions.json", questions)
        raw.write_json(folder / "vqav2" / f"{split.name}_annotations.json", annotations)
    raw.write_json(folder / "refcoco" / "finetune_refcoco_train.json", raw.refcoco(raw.TRAIN, train))
    raw.write_json(folder / "llava" / "llava_instruct.json", raw.llava(raw.TRAIN, train))
