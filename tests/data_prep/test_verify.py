"""One flipped or missing byte anywhere is found, and its file named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS_FILE
from data_prep.common.files import hash_json, write_atomic
from data_prep.common.workers import ALONE, LocalTeam
from data_prep.images.store import ImageStore
from data_prep.ingest.samples import Sample
from data_prep.materialize import materialize, pack_row
from data_prep.packs import Manifest, Source
from data_prep.planning.step import PackingPlan
from data_prep.progress import Reporter
from data_prep.verify import verify, verify_share
from tests.data_prep.raw import make_recipe, png, prepare, tree_hashes, write_tar, write_world

KINDS = {
    "manifest": "packs/*/manifest.json",
    "hash of the manifest": "packs/*/manifest.sha256",
    "rows": "packs/*/rows-*.arrow",
    "plan": "packs/*/plan.arrow",
    "tokenizer of packs": "packs/*/tokenizer/*",
    "hash of the plan": "packs/*/plan.sha256",
    "index of the store": "images/*/store.json",
    "hash of the index": "images/*/store.sha256",
    "shard of the store": "images/*/images-*.arrow",
    "tokenizer": "tokenizer/tokenizer.model",
    "table of special tokens": "tokenizer/mma_tokenizer.json",
    "marker of a shard": "ingest/*/*/*.json",
    "tokens of a shard": "ingest/*/*/*.arrow",
    "stats of a shard": "ingest/*/*/*.stats",
    "image hashes of a shard": "ingest/*/*/*.sha256",
    "image files of a shard": "ingest/*/*/*.sources",
    "rejects of a shard": "ingest/*/*/*.rejects",
    "store rows of a shard": "ingest/*/*/*.rows-*",
    "list of shards": "ingest/*/shards-*.json",
    "list of raw files": "ingest/*/raw-files.json",
    "list of rejects": "rejects.jsonl",
    "hash of the rejects": "rejects.sha256",
    "origin of the tokenizer": "tokenizer/origin.json",
    "trained tokenizer": "tokenizer/trained.model",
}


MADE_WHEN_MISSING = (
    "marker of a shard",
    "store rows of a shard",
    "list of shards",
    "list of raw files",
    "trained tokenizer",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_world(folder / "raw", captions=12, talks=12)
    write_tar(folder / "raw" / "captions" / "bad.tar", {"broken": (b"<html>", "a caption")})
    prepare(make_recipe(folder, max_bad_fraction=0.1))
    return folder / "out"


def test_every_file_but_working_notes_is_of_a_known_kind(out: Path) -> None:
    known = {path for pattern in KINDS.values() for path in out.glob(pattern)} | {out / EVENTS_FILE}
    assert {path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts} == known
    assert len(list(verify(out))) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_and_its_file_named(out: Path, kind: str) -> None:
    rng = random.Random(kind)
    paths = [path for path in sorted(out.glob(KINDS[kind])) if path.stat().st_size]
    for path in rng.choices(paths, k=5):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), whole[: rng.randrange(len(whole))]):
            path.write_bytes(damaged)
            listed = (path, *(path.with_suffix(suffix) for suffix in (".json", ".jsonl", ".arrow")))
            assert named_by_verify(out) in listed  # a listing and its hash: one of them
        path.unlink()
        if kind not in MADE_WHEN_MISSING:
            assert named_by_verify(out) == path
        path.write_bytes(whole)
    assert named_by_verify(out) is None


def test_the_advice_of_verify_repairs_a_damaged_file(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    recipe, before = make_recipe(tmp_path, max_bad_fraction=0.1), tree_hashes(out)
    for kind, pattern in KINDS.items():
        path = next(path for path in sorted((tmp_path / "out").glob(pattern)) if path.stat().st_size)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UserError) as said:
            list(verify(tmp_path / "out"))
        if "delete it" in str(said.value):
            Path(str(said.value).partition(": ")[0]).unlink()
        prepare(recipe)
        assert named_by_verify(tmp_path / "out") is None, kind
        assert tree_hashes(tmp_path / "out") == before, kind


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_image_shard_rebuilds_only_its_own_output(out: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    shards = sorted((tmp_path / "out").glob("images/*/images-*.arrow"))
    lost = next(path for path in shards if png(13) in path.read_bytes())  # an image of the second tar
    if damage == "gone":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[:-9])
    made = {path: path.stat().st_ino for path in (tmp_path / "out").glob("ingest/*/*/*.json")}
    kept = {path: path.stat().st_ino for path in shards if path != lost}
    prepare(make_recipe(tmp_path, max_bad_fraction=0.1))
    assert {path.name for path, inode in made.items() if path.stat().st_ino != inode} == {"captions%2F00001.json"}
    assert {path: path.stat().st_ino for path in kept} == kept
    assert tree_hashes(tmp_path / "out") == tree_hashes(out) and named_by_verify(tmp_path / "out") is None


def test_rows_never_follow_a_damaged_plan(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    plan = tmp_path / "out" / "packs" / "sft" / "plan.arrow"
    made = PackingPlan.load(plan)
    with pa.OSFile(str(plan), "rb") as file:
        table = pa.ipc.open_file(file).read_all()
    other = table.set_column(2, "shard", pa.array(made.shard[::-1]))  # a whole file with the same settings
    with pa.OSFile(str(plan), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(other)
    with pytest.raises(UserError, match=r"plan.arrow: differs from plan.sha256"):
        PackingPlan.load(plan)
    prepare(make_recipe(tmp_path, max_bad_fraction=0.1))
    assert tree_hashes(tmp_path / "out") == tree_hashes(out)


def named_by_verify(out: Path) -> Path | None:
    try:
        list(verify(out))
    except UserError as problem:
        return Path(str(problem).partition(": ")[0])
    return None


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_ranks_share_the_work_and_miss_nothing(out: Path, parts: int) -> None:
    folder = out / "packs" / "sft"
    manifest = Manifest.load(folder)
    store = (folder / manifest.image_store).resolve()
    files = [folder / entry.name for entry in manifest.files]
    files += [store / entry.name for entry in ImageStore(store).shards]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        finders = 0
        for part in range(parts):
            try:
                verify_share(folder, part, parts)
            except UserError as problem:
                assert path.name in str(problem)
                finders += 1
        path.write_bytes(whole)
        assert finders == 1


def test_images_that_are_in_no_store_yet_are_checked(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    output = next((tmp_path / "out").glob("ingest/captions/*/*00000.arrow"))
    shard = next((tmp_path / "out").glob("images/*/images-00000.arrow"))
    images = output.with_suffix(".images")
    images.write_bytes(shard.read_bytes())
    list(verify(tmp_path / "out"))
    images.write_bytes(shard.read_bytes().replace(png(1), png(1)[:-1] + b"\0"))
    with pytest.raises(UserError, match=r"00000.images: differs from captions%2F00000.json"):
        list(verify(tmp_path / "out"))


def test_outputs_of_another_version_are_ignored(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    whole = list(verify(tmp_path / "out"))
    marker = next((tmp_path / "out").glob("ingest/captions/*/*00000.json"))
    old = {"raw": "", "kept": 3}  # no version, and other fields
    other = marker.parent.with_name("earlier") / marker.name
    write_atomic(other, json.dumps({**old, "marker_sha256": hash_json(old)}).encode())
    assert list(verify(tmp_path / "out")) == whole
    other.write_bytes(other.read_bytes().replace(b'"kept": 3', b'"kept": 4'))
    assert named_by_verify(tmp_path / "out") == other


def test_damaged_markers_of_row_files_are_made_again(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    recipe = make_recipe(tmp_path, max_bad_fraction=0.1)
    before = tree_hashes(tmp_path / "out")
    for number, marker in enumerate(sorted((tmp_path / "out").glob("packs/*/.work/rows-*.json"))):
        text = marker.read_bytes()
        marker.write_bytes(text.replace(b'"targets": ', b'"targets": 9') if number else text[:20])
    materialize(recipe, ALONE, Reporter(quiet=True))
    assert tree_hashes(tmp_path / "out") == before


def test_damaged_tokens_never_become_rows(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent, tmp_path, dirs_exist_ok=True)
    recipe = make_recipe(tmp_path, max_bad_fraction=0.1)
    before = tree_hashes(tmp_path / "out")
    tokens = sorted((tmp_path / "out").glob("ingest/captions/*/*.arrow"))[-1]
    whole = tokens.read_bytes()
    at = len(whole) // 2
    tokens.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    materialize(recipe, ALONE, Reporter(quiet=True))  # nothing is made of them
    for rows in (tmp_path / "out").glob("packs/*/rows-*.arrow"):
        rows.unlink()
    for team in (ALONE, LocalTeam(1, 0, 2), LocalTeam(1, 1, 2)):
        with pytest.raises(UserError, match=rf"^{tokens}: differs from {tokens.stem}.json "):
            materialize(recipe, team, Reporter(quiet=True))
    tokens.unlink()
    prepare(recipe)
    assert tree_hashes(tmp_path / "out") == before


def test_images_that_do_not_fit_their_positions_are_a_clear_error() -> None:
    ids = np.array([5, 9, 9, 9, 6], dtype=np.int32)
    sample = Sample("one", "", ids, np.ones(5, dtype=np.uint8), np.zeros(1, dtype=np.int64))
    with pytest.raises(
        UserError, match="image positions and images do not match in one of talk/one: `mma-prep verify`"
    ):
        pack_row([sample], (Source("talk", "one", 0),), 8, image_tokens=2, image_id=9, pad_id=0)
