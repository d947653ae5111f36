"""Building the image store, compared with a plain dictionary, for all ranges, shards and interruptions."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.common.arrow_files import ArrowWriter
from data_prep.common.errors import UserError
from data_prep.common.files import sha256_file, temporary_beside, write_atomic
from data_prep.common.workers import ALONE, LocalTeam
from data_prep.images import store as images_module
from data_prep.images.store import IMAGE_SCHEMA, ImageStore
from data_prep.ingest import image_hashes
from data_prep.ingest import image_store_build as build
from data_prep.ingest.store_rows import read_store_rows
from data_prep.ingest.workspace import ShardOutput, ShardReport
from data_prep.quarantine import Tally
from tests.data_prep.raw import tree_hashes

Made = tuple[list[ShardOutput], list[list[bytes]]]


def make_unit(output: ShardOutput, images: list[bytes]) -> None:
    """Write the files of a shard output that the build reads."""
    with ArrowWriter(output.images, IMAGE_SCHEMA, batch_rows=images_module.SHARD_BATCH_ROWS) as writer:
        for data in images:
            writer.append((hashlib.sha256(data).digest(), len(data), 3, data))
    write_atomic(output.image_hashes, image_hashes.to_bytes(hashlib.sha256(data).digest() for data in images))
    report = ShardReport("", Tally(1), writer.entry, 0, "", "", sha256_file(output.image_hashes), "", "")
    write_atomic(output.marker, report.to_json().encode())


def make_outputs(root: Path, seed: int, count: int = 9) -> Made:
    """Shard outputs whose images overlap: about half are shared with others; one has none."""
    rng = random.Random(seed)
    pool = [rng.randbytes(rng.randint(1, 40)) for _ in range(60)]
    contents = [list(dict.fromkeys(rng.choices(pool, k=rng.randint(1, 25)))) for _ in range(count)]
    contents[count // 2] = []
    outputs = [ShardOutput("c", f"{number:03d}", root / "ingest" / "c" / "key", "") for number in range(count)]
    for output, images in zip(outputs, contents, strict=True):
        make_unit(output, images)
    return outputs, contents


def set_sizes(monkeypatch: pytest.MonkeyPatch, range_images: int, batch_rows: int) -> None:
    monkeypatch.setattr(build, "RANGE_IMAGES", range_images)
    monkeypatch.setattr(build, "RANGE_SHARE", 0)
    for module in (build, images_module):
        monkeypatch.setattr(module, "SHARD_BATCH_ROWS", batch_rows)


@pytest.fixture(params=[(1 << 17, 64), (7, 5), (1, 1)], ids=["as shipped", "small", "single"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, *request.param)


def check(outputs: list[ShardOutput], contents: list[list[bytes]], store: ImageStore) -> None:
    """The slow oracle: distinct images in order of first use, and the store rows of each shard output."""
    distinct = list(dict.fromkeys(data for images in contents for data in images))
    assert [store.read(row) for row in range(len(store))] == distinct
    assert [store.sha256(row) for row in range(len(store))] == [hashlib.sha256(data).hexdigest() for data in distinct]
    assert [store.size(row) for row in range(len(store))] == [(len(data), 3) for data in distinct]
    shuffled = np.random.default_rng(0).permutation(len(store))
    assert store.hashes(shuffled).tobytes() == b"".join(hashlib.sha256(distinct[row]).digest() for row in shuffled)
    for output, images in zip(outputs, contents, strict=True):
        rows = read_store_rows(output.rows(store.directory.name))
        assert rows.tolist() == [distinct.index(data) for data in images]
        assert not output.images.exists()
    store.verify()
    assert not (store.directory / ".work").exists()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("sizes")
def test_a_store_holds_each_image_once_in_order_of_first_use(tmp_path: Path, seed: int) -> None:
    outputs, contents = make_outputs(tmp_path, seed)
    store = build.build_image_store(outputs, tmp_path / "images", ALONE)
    check(outputs, contents, ImageStore(store))
    assert build.build_image_store(outputs, tmp_path / "images", ALONE) == store


@pytest.mark.usefixtures("sizes")
def test_outputs_without_images_give_an_empty_store(tmp_path: Path) -> None:
    outputs, _ = make_outputs(tmp_path, 0, count=1)
    assert len(ImageStore(build.build_image_store(outputs, tmp_path / "images", ALONE))) == 0
    assert len(ImageStore(build.build_image_store([], tmp_path / "images", ALONE))) == 0


@pytest.mark.usefixtures("sizes")
def test_images_come_from_earlier_stores_and_a_deleted_one_is_named(tmp_path: Path) -> None:
    outputs, contents = make_outputs(tmp_path, 4)
    stores = tmp_path / "images"
    first = build.build_image_store(outputs, stores, ALONE)
    new = ShardOutput("c", "000-new", outputs[0].folder, "")
    make_unit(new, [b"never seen", contents[0][0]])
    more, held = [outputs[3], new, *outputs[5:]], [contents[3], [b"never seen", contents[0][0]], *contents[5:]]
    second = build.build_image_store(more, stores, ALONE)
    assert second != first
    check(more, held, ImageStore(second))
    for store in (first, second):
        (store / "store.json").unlink()
    with pytest.raises(UserError, match=r"c/00\d: its images are in no image store any more .* run `mma-prep ingest`"):
        build.build_image_store(outputs, stores, ALONE)
    assert not all(output.marker.exists() for output in outputs)


def disjoint_outputs(root: Path, count: int = 4) -> Made:
    """Shard outputs that share no image."""
    contents = [[b"%d %d" % (number, image) for image in range(70)] for number in range(count)]
    outputs = [ShardOutput("c", f"{number:03d}", root / "ingest" / "c" / "key", "") for number in range(count)]
    for output, images in zip(outputs, contents, strict=True):
        make_unit(output, images)
    return outputs, contents


def inodes(paths: Iterable[Path]) -> list[int]:
    return [path.stat().st_ino for path in paths]


def shards_of(store: Path) -> list[Path]:
    return sorted(store.glob("*.arrow"))


def test_images_of_only_one_output_are_never_copied(tmp_path: Path) -> None:
    outputs, contents = disjoint_outputs(tmp_path)
    own = inodes(output.images for output in outputs)
    first = build.build_image_store(outputs[:3], tmp_path / "images", ALONE)
    assert inodes(shards_of(first)) == own[:3]
    second = build.build_image_store(outputs, tmp_path / "images", ALONE)  # three come from the first store
    assert inodes(shards_of(second)) == own
    check(outputs, contents, ImageStore(second))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2), (2, 1, 0)])
def test_a_store_does_not_show_where_its_images_lay_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Sequence[int], links: bool
) -> None:
    """Outputs 1 and 2 share images with output 0: an image copied in one store is linked in another."""
    kept = []
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda self, target: os.link("/nowhere", self))
    for name, earlier in (("fresh", ()), ("late", ((0, 1, 2), (2,)))):
        outputs, contents = disjoint_outputs(tmp_path / name, 3)
        contents = [contents[0], contents[0][60:] + contents[1], contents[2] + contents[0][:3]]
        for output, images in zip(outputs, contents, strict=True):
            make_unit(output, images)
        for before in earlier:
            build.build_image_store([outputs[which] for which in before], tmp_path / name / "images", ALONE)
        store = build.build_image_store([outputs[which] for which in order], tmp_path / name / "images", ALONE)
        check([outputs[which] for which in order], [contents[which] for which in order], ImageStore(store))
        kept.append(tree_hashes(store))
    assert kept[0] == kept[1]


def test_a_truncated_image_file_is_rebuilt(tmp_path: Path) -> None:
    (output, *_), _ = disjoint_outputs(tmp_path)
    for path in (output.tokens, output.stats, output.rejects, output.sources):
        path.touch()
    assert output.done() is not None
    with output.images.open("rb+") as file:
        file.truncate(100)
    assert output.done() is None


def test_files_of_a_killed_attempt_are_removed_when_the_shard_is_rebuilt(tmp_path: Path) -> None:
    (output, *_), _ = disjoint_outputs(tmp_path)
    other = ShardOutput(output.corpus, f"{output.shard}.seg", output.folder, "")
    left = [
        temporary_beside(path) for path in (output.images, output.tokens, output.marker, other.images, other.marker)
    ]
    for path in left:
        path.touch()
    output.forget()
    assert [path.exists() for path in left] == [False, False, False, True, True]


def test_many_threads_read_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "OPEN_SHARDS", 3)
    outputs, contents = disjoint_outputs(tmp_path)
    store = ImageStore(build.build_image_store(outputs, tmp_path / "images", ALONE))
    rows = np.random.default_rng(0).integers(len(store), size=2000).tolist()
    whole = [data for images in contents for data in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.read, rows)) == [whole[row] for row in rows]
    store = ImageStore(store.directory)
    for row in rows:
        store.read(row)
        assert 0 < len(store._open_shards) <= 3


class Killed(Exception):  # noqa: N818 - stands for kill -9
    pass


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_build_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    set_sizes(monkeypatch, 5, 5)
    outputs, contents = make_outputs(tmp_path / "whole", 1)
    whole = build.build_image_store(outputs, tmp_path / "whole" / "images", ALONE)
    outputs, contents = make_outputs(tmp_path / "cut", 1)
    rng, written = random.Random(seed), build.write_atomic
    for _ in range(6):
        left = rng.randint(0, 25)

        def dying(step: Callable[..., object]) -> Callable[..., object]:
            def run(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return step(*arguments, **named)

            return run

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(build, "write_atomic", dying(written))
            patch.setattr(build, "_write_shard", dying(build._write_shard))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            build.build_image_store(outputs, tmp_path / "cut" / "images", ALONE)
            raise Killed  # it was done before its time came
    store = build.build_image_store(outputs, tmp_path / "cut" / "images", ALONE)
    check(outputs, contents, ImageStore(store))
    assert tree_hashes(tmp_path / "cut") == tree_hashes(tmp_path / "whole") and store.name == whole.name


@pytest.mark.slow
def test_several_processes_build_the_same_store(tmp_path: Path) -> None:
    outputs, contents = make_outputs(tmp_path, 2)
    check(outputs, contents, ImageStore(build.build_image_store(outputs, tmp_path / "images", LocalTeam(3))))


def test_members_that_look_at_different_moments_leave_no_shard_unwritten(tmp_path: Path) -> None:
    jobs = [build.ShardJob(tmp_path, number, number, number, number + 1) for number in range(10)]
    (tmp_path / ".work").mkdir()
    written = list[int]()
    for member in range(3):
        mine = build.shards_to_write(jobs, LocalTeam(1, member, 3))
        for job in mine[: 2 - member]:  # the next one looks when this one has done a part of its own
            job.path.touch()
            job.marker.touch()
        written += [job.number for job in mine]
    assert sorted(written) == list(range(10))


def test_a_second_attempt_leaves_the_rows_alone_that_the_first_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, _ = make_outputs(tmp_path, 3)
    store = tmp_path / "images" / build.store_key(outputs)
    build._prepare(outputs, store)
    written = (store / ".work" / "rows").read_bytes()

    def look(outputs: object, starts: object, owners: object) -> None:
        assert (store / ".work" / "rows").read_bytes() == written
        raise Killed

    monkeypatch.setattr(build, "_find_owners", look)
    with pytest.raises(Killed):
        build._prepare(outputs, store)
    assert (store / ".work" / "rows").read_bytes() == written
    assert [path.name for path in (store / ".work").glob(".*")] == []


def test_nothing_is_open_in_a_folder_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps an open file under another name, so that its folder cannot be removed."""
    outputs, contents = make_outputs(tmp_path, 3)
    seen, remove = list[str](), shutil.rmtree

    def look(folder: Path) -> None:
        seen.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line)
        seen.extend(str(path) for path in Path("/proc/self/fd").iterdir() if str(folder) in str(path.resolve()))
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", look)
    check(outputs, contents, ImageStore(build.build_image_store(outputs, tmp_path / "images", ALONE)))
    assert seen == []


def test_what_a_killed_member_left_in_the_store_is_removed(tmp_path: Path) -> None:
    outputs, contents = make_outputs(tmp_path, 3)
    store = tmp_path / "images" / build.store_key(outputs)
    store.mkdir(parents=True)
    (store / ".images-00000.arrow.12345678.tmp").touch()
    check(outputs, contents, ImageStore(build.build_image_store(outputs, tmp_path / "images", ALONE)))
    assert [path.name for path in store.glob(".*")] == []


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_damaged_images_are_not_copied_into_a_store(tmp_path: Path) -> None:
    outputs, contents = disjoint_outputs(tmp_path, 2)
    make_unit(outputs[1], [contents[0][3], *contents[1]])
    first = build.build_image_store(outputs[:1], tmp_path / "images", ALONE)
    whole = outputs[1].images.read_bytes()
    replaced(outputs[1].images, b"1 33", b"1 34")
    with pytest.raises(UserError, match=rf"^{outputs[1].images}: differs from 001.json .* delete it and run"):
        build.build_image_store(outputs, tmp_path / "images", ALONE)
    outputs[1].images.write_bytes(whole)
    replaced(shards_of(first)[0], b"0 33", b"0 34")
    with pytest.raises(UserError, match=rf"^{first}: image 33 is damaged; `mma-prep verify` names the file"):
        build.build_image_store(outputs[::-1], tmp_path / "images", ALONE)


def test_a_full_disk_is_not_left_full(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError), ArrowWriter(tmp_path / "images", IMAGE_SCHEMA) as writer:
            for _ in range(3000):
                writer.append((bytes(32), 3, 3, bytes(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_before_anything_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot reserve 4,611,686,018,427,387,904 bytes \("):
        build.allocate(tmp_path / "rows", 1 << 62)
