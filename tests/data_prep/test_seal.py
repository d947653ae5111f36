"""Sealing against a plain dictionary: every range, shard and interruption gives the same store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import digests, seal
from data_prep.arrow_files import ArrowWriter
from data_prep.errors import UserError
from data_prep.images import IMAGE_SCHEMA, ImageStore
from data_prep.packs import sha256_file, write_atomic
from data_prep.quarantine import Tally
from data_prep.workers import ALONE, LocalTeam
from data_prep.workspace import Unit, UnitReport
from tests.data_prep.raw import tree_hashes

Made = tuple[list[Unit], list[list[bytes]]]


def make_unit(unit: Unit, images: list[bytes]) -> None:
    """Write what sealing reads of a unit."""
    with ArrowWriter(unit.images, IMAGE_SCHEMA, batch_rows=4, hashed=False) as writer:
        for data in images:
            writer.append((hashlib.sha256(data).digest(), len(data), 3, data))
    write_atomic(unit.digests, digests.to_bytes({hashlib.sha256(data).digest(): len(data) for data in images}))
    write_atomic(
        unit.marker,
        UnitReport("", Tally(1), len(images), 0, "", "", sha256_file(unit.digests), "", "").to_json().encode(),
    )


def make_units(root: Path, seed: int, count: int = 9) -> Made:
    """Units whose images overlap: about half are shared with others; one unit has none."""
    rng = random.Random(seed)
    pool = [rng.randbytes(rng.randint(1, 40)) for _ in range(60)]
    contents = [list(dict.fromkeys(rng.choices(pool, k=rng.randint(1, 25)))) for _ in range(count)]
    contents[count // 2] = []
    units = [Unit("c", f"{number:03d}", root / "ingest" / "c" / "key", "") for number in range(count)]
    for unit, images in zip(units, contents, strict=True):
        make_unit(unit, images)
    return units, contents


@pytest.fixture(params=[(1 << 17, 64 << 20, 1 << 14), (7, 100, 5), (1, 1, 1)], ids=["as shipped", "small", "single"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("RANGE_IMAGES", "SHARD_BYTES", "SHARD_ROWS"), request.param, strict=True):
        monkeypatch.setattr(seal, name, value)


def check(units: list[Unit], contents: list[list[bytes]], store: ImageStore) -> None:
    """The slow oracle: distinct images in order of first use, and each unit's rows into them."""
    distinct = list(dict.fromkeys(data for images in contents for data in images))
    assert [store.read(row) for row in range(len(store))] == distinct
    assert [store.sha256(row) for row in range(len(store))] == [hashlib.sha256(data).hexdigest() for data in distinct]
    assert [store.size(row) for row in range(len(store))] == [(len(data), 3) for data in distinct]
    for unit, images in zip(units, contents, strict=True):
        rows = np.fromfile(unit.rows(store.directory.name), dtype=np.int64)
        assert rows.tolist() == [distinct.index(data) for data in images]
        assert not unit.images.exists()
    store.verify()
    assert not (store.directory / ".work").exists()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("sizes")
def test_a_store_holds_each_image_once_in_order_of_first_use(tmp_path: Path, seed: int) -> None:
    units, contents = make_units(tmp_path, seed)
    store = seal.seal_store(units, tmp_path / "images", ALONE)
    check(units, contents, ImageStore(store))
    assert seal.seal_store(units, tmp_path / "images", ALONE) == store


@pytest.mark.usefixtures("sizes")
def test_units_without_images_give_an_empty_store(tmp_path: Path) -> None:
    units, _ = make_units(tmp_path, 0, count=1)
    assert len(ImageStore(seal.seal_store(units, tmp_path / "images", ALONE))) == 0
    assert len(ImageStore(seal.seal_store([], tmp_path / "images", ALONE))) == 0


@pytest.mark.usefixtures("sizes")
def test_images_come_from_earlier_stores_and_a_deleted_one_is_named(tmp_path: Path) -> None:
    units, contents = make_units(tmp_path, 4)
    stores = tmp_path / "images"
    first = seal.seal_store(units, stores, ALONE)
    new = Unit("c", "000-new", units[0].folder, "")
    make_unit(new, [b"never seen", contents[0][0]])
    more, held = [units[3], new, *units[5:]], [contents[3], [b"never seen", contents[0][0]], *contents[5:]]
    second = seal.seal_store(more, stores, ALONE)
    assert second != first
    check(more, held, ImageStore(second))
    for store in (first, second):
        (store / "store.json").unlink()
    with pytest.raises(UserError, match=r"c/00\d: its images are in no store any more .* run ingest again"):
        seal.seal_store(units, stores, ALONE)
    assert not all(unit.marker.exists() for unit in units)


class Killed(Exception):  # noqa: N818 - stands for kill -9
    pass


@pytest.mark.parametrize("seed", range(12))
def test_sealing_that_stops_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name in ("RANGE_IMAGES", "SHARD_BYTES", "SHARD_ROWS"):
        monkeypatch.setattr(seal, name, 5)
    units, contents = make_units(tmp_path / "whole", 1)
    whole = seal.seal_store(units, tmp_path / "whole" / "images", ALONE)
    units, contents = make_units(tmp_path / "cut", 1)
    rng, written = random.Random(seed), seal.write_atomic
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
            patch.setattr(seal, "write_atomic", dying(written))
            patch.setattr(seal, "_write_shard", dying(seal._write_shard))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            seal.seal_store(units, tmp_path / "cut" / "images", ALONE)
            raise Killed  # it was done before its time came
    store = seal.seal_store(units, tmp_path / "cut" / "images", ALONE)
    check(units, contents, ImageStore(store))
    assert tree_hashes(tmp_path / "cut") == tree_hashes(tmp_path / "whole") and store.name == whole.name


@pytest.mark.slow
def test_several_processes_seal_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "SHARD_ROWS", 5)
    units, contents = make_units(tmp_path, 2)
    check(units, contents, ImageStore(seal.seal_store(units, tmp_path / "images", LocalTeam(3))))


def test_members_that_look_at_different_moments_leave_no_shard_unwritten(tmp_path: Path) -> None:
    jobs = [seal.ShardJob(tmp_path, number, number, number + 1) for number in range(10)]
    (tmp_path / ".work").mkdir()
    written = list[int]()
    for member in range(3):
        mine = seal.to_write(jobs, LocalTeam(1, member, 3))
        for job in mine[: 2 - member]:  # the next one looks when this one has done a part of its own
            job.path.touch()
            job.marker.touch()
        written += [job.number for job in mine]
    assert sorted(written) == list(range(10))


def test_a_second_attempt_leaves_the_rows_alone_that_the_first_has_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units, _ = make_units(tmp_path, 3)
    store = tmp_path / "images" / seal.store_key(units)
    seal._prepare(units, store)
    mapped = seal._context(store).rows
    before = mapped.tolist()

    def look(units: object, starts: object, owners: object) -> None:
        assert mapped.tolist() == before
        raise Killed

    monkeypatch.setattr(seal, "_find_owners", look)
    with pytest.raises(Killed):
        seal._prepare(units, store)
    assert mapped.tolist() == before and [path.name for path in (store / ".work").glob(".*")] == []


def test_a_full_disk_is_named_before_anything_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: no room for 4,611,686,018,427,387,904 bytes \("):
        seal.allocate(tmp_path / "rows", 1 << 62)
