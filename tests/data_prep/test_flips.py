"""Random flipped bits in an output folder: ``verify`` finds each, and no later step turns one into other packs.

``FLIPS`` sets the number of flips, ``FLIPS_SEED`` the seed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS_FILE
from data_prep.images.store import ImageStore
from data_prep.packs import PackReader
from data_prep.recipe import Recipe
from data_prep.verify import verify
from tests.data_prep.raw import make_recipe, prepare, recipe_dict, tree_hashes, write_tar, write_world

FLIPS = int(os.environ.get("FLIPS", "200"))
SEED = int(os.environ.get("FLIPS_SEED", "0"))
PARTS = 4
IGNORED = (".lock", EVENTS_FILE)


class Output:
    """An output folder in memory, put back after every flip."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, recipe.out_dir
        self.files = {path: path.read_bytes() for path in self._paths()}
        self.hashes = tree_hashes(self.out)

    def _paths(self) -> Iterator[Path]:
        return (path for path in sorted(self.out.rglob("*")) if path.is_file() and path.name not in IGNORED)

    def restore(self) -> None:
        for path in list(self._paths()):
            if path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # it may have a second name
                path.write_bytes(content)

    def targets(self) -> list[Path]:
        """Files a flip may hit: all that later steps read; one draw per folder and kind, not per byte."""
        return [path for path, content in self.files.items() if content and ".work" not in path.parts]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Output]:
    folder = tmp_path_factory.mktemp("flips")
    write_world(folder / "raw", tars=2, captions=8, talks=8)
    write_tar(folder / "raw" / "captions" / "bad.tar", {"broken": (b"<html>", "a caption")})
    packs = {name: pack for name, pack in recipe_dict(folder, folder)["packs"].items() if name != "pt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # half of the time
        recipe = make_recipe(folder, max_bad_fraction=0.2, packs=packs)
        prepare(recipe)
        yield Output(recipe)


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()
    path.write_bytes(content)


def error_of(step: object) -> str:
    """Return the message of a UserError, or an empty string; any other exception is a traceback, and fails."""
    try:
        step()  # type: ignore[operator]
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def rebuild(output: Output, path: Path) -> str:
    """Make the packs again from what is there; return the error."""
    if "packs" in path.parts:
        for rows in path.parent.glob("rows-*.arrow"):
            rows.unlink()
    else:
        shutil.rmtree(output.out / "packs", ignore_errors=True)
    return error_of(lambda: prepare(output.recipe))


@pytest.mark.parametrize("part", range(PARTS))
def test_no_flip_is_silent_and_none_is_a_traceback(output: Output, part: int) -> None:
    rng = random.Random(f"{SEED} {part}")
    silent: list[str] = []
    for _ in range(-(-FLIPS // PARTS)):
        output.restore()
        path = rng.choice(output.targets())
        flip(path, rng)
        damaged = path.read_bytes()
        where = str(path.relative_to(output.out))
        if not error_of(lambda: list(verify(output.out))):
            silent.append(f"verify: {where}")
        if path.name.startswith("rows-") and "packs" in path.parts:
            if not error_of(lambda folder=path.parent: PackReader(folder, verify=True)):
                silent.append(f"read: {where}")
        elif not rebuild(output, path):
            found = tree_hashes(output.out)
            if path.is_file() and path.read_bytes() == damaged:  # not read by any step: verify has to find it
                found[where] = output.hashes.get(where, "")
                found = {name: value for name, value in found.items() if value}
            if found != output.hashes:
                silent.append(f"packs: {where}")
    output.restore()
    assert not silent
    assert not error_of(lambda: list(verify(output.out)))


def test_flipped_image_shards_give_bytes_or_one_error_even_without_hashes(output: Output) -> None:
    output.restore()
    rng = random.Random(SEED)
    path = max(output.out.glob("images/*/images-*.arrow"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    errors = 0
    for _ in range(80):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.unlink()
        path.write_bytes(damaged)
        store = ImageStore(path.parent)
        errors += bool(error_of(lambda store=store: [store.read(row) for row in range(len(store))]))
    output.restore()
    assert errors > 0
