"""Augmentation: only where it is truthful, the same pixels on any ranks and after a resume."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.cli import main
from data_prep.common.errors import UserError
from data_prep.corpora import CORPORA, build_corpus
from data_prep.example import Example, ImageRef, Turn
from data_prep.images.augment import (
    CROP,
    FLIP,
    UNIT,
    WHOLE,
    Augment,
    allowed,
    allowed_by,
    apply_augmentation,
    draw_augmentations,
)
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.packs import PackReader
from data_prep.recipe import load_recipe
from pipeline.data.batches import BatchSource
from pipeline.data.order import BatchOrder
from pipeline.masks import get_policy
from pipeline.model.preprocess import Preprocess, stacked
from tests.data_prep.raw import make_recipe, png, prepare, recipe_dict, tree_hashes, write_recipe, write_tar

SENTENCES = [
    ("a dog asleep on a sofa", FLIP | CROP),
    ("What colour is the bus?\nred", FLIP | CROP),
    ("Answer the question using a single word or phrase. What sport is this?\ntennis", FLIP | CROP),
    ("Answer with the option's letter from the given choices directly. What sport?\nA. ski\nB. surf", FLIP | CROP),
    ("a wrighting desk lefty-free", FLIP | CROP),
    ("two dogs asleep on a sofa", FLIP),
    ("How many people are in the picture?\nseveral", FLIP),
    ("Is there a cat?\nno", FLIP),
    ("the lamp above the table", FLIP),
    ("a bird in the top corner", FLIP),
    ("the man next to the car", FLIP),
    ("What is to the left of the cup?", 0),
    ("a left-handed pitcher", 0),
    ("The cup is on the Right.", 0),
    ("a man turned sideways", 0),
    ("a boat heading east", 0),
    ("the dog is facing the camera", 0),
    ("a mirror in the hall", 0),
    ("which way is the bike pointing, what direction", 0),
    ("a stop sign at the road", 0),
    ("What does the shirt say?", 0),
    ("What is the number on the train?", 0),
    ("a bus of line 42", 0),
    ("what letter is on the wall", 0),
    ("a clock on a tower", 0),
    ("a shop called \"Rosie\"", 0),
    ("a shop called \u201cRosie\u201d", 0),
    ("a shop called 'Rosie'", 0),
    ("the dogs' owners' coats", FLIP | CROP),
    ("it's what o'clock", 0),
    ("<bbox>[0.1, 0.2][0.3, 0.4]</bbox>", 0),
    ("a small box", 0),
    ("a map of Europe", 0),
    ("ein Hund schläft", 0),
    ("一只狗", 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "bits"), SENTENCES)
def test_what_a_text_allows(text: str, bits: int) -> None:
    assert allowed(text) == bits


def test_every_text_of_a_sample_has_a_say_and_boxes_forbid_all() -> None:
    image = ImageRef("i", data=b"")
    turns = [Turn("user", (image, "what is it?")), Turn("assistant", ("a dog",)), Turn("user", ("and its name?",))]
    assert allowed_by(Example("e", tuple(turns[:2]))) == FLIP | CROP
    assert allowed_by(Example("e", tuple(turns))) == 0
    boxed = Turn("user", (ImageRef("i", data=b"", annotated_size=(2, 3)), "what is it?"))
    assert allowed_by(Example("e", (boxed, turns[1]))) == 0
    assert allowed_by(Example("e", turns[1:2])) == 0, "no image, nothing to change"


def test_a_mirrored_image_is_exact_to_the_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert apply_augmentation(image, np.array(WHOLE, dtype=np.int16)) is image
    mirrored = apply_augmentation(image, np.array((1, *WHOLE[1:]), dtype=np.int16))
    assert np.array_equal(np.asarray(mirrored), pixels[:, ::-1])
    cut = apply_augmentation(image, np.array((1, 200, 0, 500, 1000), dtype=np.int16))
    assert np.array_equal(np.asarray(cut), pixels[:, 2:7][:, ::-1])
    assert apply_augmentation(image.crop((0, 0, 2, 2)), np.array((0, 999, 999, 1, 1), dtype=np.int16)).size == (1, 1)


def test_augmentations_depend_on_their_key_only_keep_the_share_and_stay_inside() -> None:
    asked = Augment(flip=0.5, crop=0.7)
    augmentations = np.concatenate(
        [draw_augmentations(asked, FLIP | CROP, 2, 0, "c", "s", draw) for draw in range(2000)]
    )
    assert np.array_equal(augmentations[:2], draw_augmentations(asked, FLIP | CROP, 2, 0, "c", "s", 0))
    assert np.array_equal(augmentations[::2, 0], augmentations[1::2, 0]), "all images of a draw are mirrored, or none"
    assert abs(augmentations[:, 0].mean() - 0.5) < 0.03
    area = augmentations[:, 3].astype(float) * augmentations[:, 4] / UNIT**2
    assert area.min() >= 0.7 and area.max() <= 1 and abs(area.mean() - 0.85) < 0.01
    assert (augmentations[:, 1:3] >= 0).all() and (augmentations[:, 1:3] + augmentations[:, 3:] <= UNIT).all()
    assert len({tuple(augmentation) for augmentation in augmentations[:, 1:].tolist()}) > 1900
    flips = draw_augmentations(Augment(flip=1.0), FLIP | CROP, 3, 1)
    assert flips.tolist() == [[1, *WHOLE[1:]]] * 3
    assert draw_augmentations(Augment(flip=1.0, crop=0.5), 0, 1, 1).tolist() == [list(WHOLE)]
    crops = np.concatenate([draw_augmentations(Augment(flip=1.0, crop=0.5), CROP, 1, n) for n in range(50)])
    assert not crops[:, 0].any() and (crops[:, 3:] < UNIT).any()


def world(root: Path, workers: int = 1, **changes: Any) -> PackReader:
    samples = {
        f"{n:09d}": (png(n), f"a {'left' if n % 3 == 0 else 'nice'} shoe" if n % 2 else "three shoes")
        for n in range(24)
    }
    for name in ("plain", "changed"):
        write_tar(root / "raw" / f"{name}.tar", samples)
    corpora = {
        "plain": {"type": "webdataset", "tars": "plain.tar"},
        "changed": {"type": "webdataset", "tars": "changed.tar", "augment": {"flip": 0.5, "crop": 0.6}},
    }
    pack = {"corpora": ["plain", "changed"], "template": "caption", "seq_len": 64, "epochs": 4}
    prepare(make_recipe(root, **{"corpora": corpora, "packs": {"pt": pack}, **changes}), workers)
    return PackReader(root / "out" / "packs" / "pt", verify=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PackReader:
    return world(tmp_path_factory.mktemp("views"))


def test_only_the_corpus_that_asks_and_the_samples_that_allow_it_are_changed(
    made: PackReader, capsys: pytest.CaptureFixture[str]
) -> None:
    changed: Counter[tuple[str, str]] = Counter()
    flips = crops = 0
    for row in made:
        assert row.augmentation is not None and row.augmentation.shape == (len(row.image_row), 5)
        for source, augmentation in zip(row.source, row.augmentation, strict=True):  # one image a sample
            number = int(source.sample[-9:])
            kind = "counts" if number % 2 == 0 else "sides" if number % 3 == 0 else "free"
            mirrored, cropped = bool(augmentation[0]), tuple(augmentation[3:]) != (UNIT, UNIT)
            changed[source.dataset, kind] += 1
            flips, crops = flips + mirrored, crops + cropped
            assert not mirrored or (source.dataset == "changed" and kind != "sides")
            assert not cropped or (source.dataset == "changed" and kind == "free")
    assert (
        crops == changed["changed", "free"] > 0
        and 0 < flips < changed["changed", "free"] + changed["changed", "counts"]
    )
    assert main(["stats", str(made.directory)]) == 0
    assert f"images: {flips} of 192 mirrored, {crops} cropped" in " ".join(capsys.readouterr().out.split())
    shown = [number for number, row in enumerate(made) if row.augmentation is not None and row.augmentation[:, 0].any()]
    assert main(["inspect", str(made.directory), "--row", str(shown[0])]) == 0
    assert "8x6 px, mirrored" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_packs_do_not_depend_on_workers_and_asking_for_nothing_changes_no_byte(
    made: PackReader, tmp_path: Path
) -> None:
    first = made.directory.parents[1]
    world(tmp_path / "two", 2)
    assert tree_hashes(tmp_path / "two" / "out") == tree_hashes(first)
    corpora = {name: {"type": "webdataset", "tars": f"{name}.tar"} for name in ("plain", "changed")}
    plain = world(tmp_path / "plain", corpora=corpora)
    assert plain[0].augmentation is None and plain.manifest.plan_sha256 != made.manifest.plan_sha256
    for ours, theirs in zip(plain, made, strict=True):
        assert np.array_equal(ours.input_ids, theirs.input_ids) and np.array_equal(ours.image_row, theirs.image_row)
        assert ours.source == theirs.source
    shutil.copytree(tmp_path / "plain" / "raw", tmp_path / "other" / "raw")
    other = world(tmp_path / "other", seed=4)
    assert any(not np.array_equal(a.augmentation, b.augmentation) for a, b in zip(other, made, strict=False))


def _pixels(reader: PackReader, dp: int, first: int) -> torch.Tensor:
    """All pixels of the steps from ``first`` on, in the order of rows."""
    order = BatchOrder(global_batch_size=2, dp=dp, microbatches=2 // dp)
    kwargs = {"order": order, "policy": get_policy("mma"), "preprocess": [Preprocess(8)], "threads": 0, "ahead": 1}
    sources = [BatchSource(reader, dp_rank=dp_rank, **kwargs) for dp_rank in range(dp)]  # type: ignore[arg-type]
    found = []
    for step in range(first, len(reader) // 2):
        for source in sources:
            found += [
                microbatch.pixels for microbatch in source.read(step).microbatches if microbatch.pixels is not None
            ]
    return torch.cat(found)


def test_the_trainer_applies_the_augmentations_of_the_pack_on_any_ranks_and_after_a_resume(made: PackReader) -> None:
    store, preprocess = ImageStore(made.directory / made.manifest.image_store), Preprocess(8)
    wanted = []
    for number in range(len(made) // 2 * 2):
        row = made[number]
        assert row.augmentation is not None
        for index, augmentation in zip(row.image_row.tolist(), row.augmentation, strict=True):
            wanted.append(apply_augmentation(decode_rgb(store.read(index)), augmentation))
    whole = _pixels(made, 1, 0)
    assert torch.equal(whole, stacked([preprocess.resize(image) for image in wanted]))
    assert torch.equal(whole, _pixels(made, 2, 0))
    later = _pixels(made, 2, 3)
    assert torch.equal(whole[-len(later) :], later)


@pytest.mark.parametrize("kind", ["refcoco", "visual_genome", "ocrvqa", "scienceqa", "vsr", "nlvr"])
def test_corpora_of_boxes_places_and_written_text_refuse(kind: str, tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[2] / "fixtures"
    assert build_corpus(kind, {}, fixtures / kind).never_augment
    pack = {"corpora": ["c"], "template": "plain", "seq_len": 64, "epochs": 1}
    corpora = {"c": {"type": kind, "augment": {"flip": 0.5}}}
    with pytest.raises(UserError, match=r"corpora\.c\.augment: .*; remove it"):
        prepare(make_recipe(tmp_path, root=str(fixtures / kind), corpora=corpora, packs={"p": pack}))
    assert kind in CORPORA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"flipp": 0.5}}, r"unknown key corpora\.captions\.augment\.flipp \(did you mean 'flip'\?\)"),
        ({"augment": {"flip": 1.5}}, r"corpora\.captions\.augment\.flip: "),
        ({"augment": {"crop": 0}}, r"corpora\.captions\.augment\.crop: "),
        ({"augment": {"flip": 0.5}, "prompts": ["What is on the left?"]}, "'What is on the left.' mentions sides"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["corpora"]["captions"]["augment"] = changes["augment"]
    content["packs"]["pt"]["prompts"] = changes.get("prompts", [])
    with pytest.raises(UserError, match=message):
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))


def test_the_shipped_prompts_allow_augmentation(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["corpora"]["captions"]["augment"] = {"flip": 0.5, "crop": 0.9}
    content["packs"]["pt"]["prompts"] = "describe.txt"
    assert load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content))).packs["pt"].prompts
