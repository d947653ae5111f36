"""Hash everything that was made, and name the first file that is missing or altered.

The chain of hashes: ``manifest.sha256`` -> ``manifest.json`` -> rows, plan, tokenizer, index of the image store -> its
shards. In an output folder, the done-marker of a unit of ingest holds its own hash and those of the unit's files; the
list of rejected samples has its hash beside it. Not covered: the notes of steps under way (``.work``), which no later
step believes without their hash or before they are written again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import REBUILD, RERUN, Hashed, read_hashed, sha256_file, sha256_line
from data_prep.images.store import ImageStore
from data_prep.ingest.image_hashes import ImageHashes
from data_prep.ingest.workspace import ShardOutput
from data_prep.packs import Manifest


def pack_folders(directory: Path) -> list[Path]:
    """Return ``directory`` if it is a pack folder, else the pack folders in it. Raises UserError for none."""
    if (directory / "manifest.json").is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob("packs/*/manifest.json"))
    if not found:
        raise UserError(f"{directory}: neither a pack folder nor an output folder of mma-prep (no manifest.json)")
    return found


def verify(directory: Path) -> Iterator[str]:
    """Check every hash of one pack folder or of all in an output folder; yield a line for each part that is whole.

    An output folder is checked with what its next run builds on: the units of ingest and the tokenizer.

    Raises:
        UserError: naming the first file that is missing or altered.
    """
    checked: set[Path] = set()
    begun = [path.parent for path in directory.glob("packs/*/manifest.sha256")]
    for folder in sorted({*pack_folders(directory), *begun}):
        files = pack_files(folder)
        _check_all([file.check for file in files if file.path not in checked])
        manifest = Manifest.load(folder)
        if manifest.image_store:
            store = (folder / manifest.image_store).resolve()
            if store / "store.json" not in checked:
                yield f"{store.name}: image store whole, {len(ImageStore(store)):,} images"
        checked.update(file.path for file in files)
        yield f"{folder}: whole, {manifest.rows:,} rows, plan {manifest.plan_sha256[:12]}"
    outputs = find_shard_outputs(directory)
    if outputs:
        _check_all([functools.partial(check_shard_output, output, directory / "images") for output in outputs])
        _check_sums(directory / "rejects.jsonl")
        for path in sorted(directory.glob("ingest/*/shards-*.json")):
            _check_own_hash(path)
        yield f"{directory / 'ingest'}: whole, {len(outputs):,} units"
    if (directory / "tokenizer").is_dir():
        _check_tokenizer(directory / "tokenizer", pack_folders(directory))


def verify_part(folder: Path, part: int, parts: int) -> None:
    """Check one of several equal shares of what a trainer reads: pack files and image store.

    Raises:
        UserError: naming a file of this share that is missing or altered.
    """
    for file in sorted(pack_files(folder), key=_size, reverse=True)[part::parts]:
        file.check()


def _size(file: Hashed) -> tuple[int, str]:
    return (file.path.stat().st_size if file.path.is_file() else 0), str(file.path)


def pack_files(folder: Path) -> list[Hashed]:
    """Return the files of a pack folder and of its image store. Raises UserError where a listing is damaged itself."""
    _check_sums(folder / "manifest.json")
    manifest = Manifest.load(folder)
    files = [Hashed(folder / entry.name, entry.sha256, "manifest.json") for entry in manifest.files]
    hashes = {file.path.name: file.sha256 for file in files}
    if hashes.get("plan.arrow") != manifest.plan_sha256:
        raise UserError(f"{folder / 'plan.arrow'}: not the plan that the rows follow; run mma-prep again")
    if not manifest.image_store:
        return files
    store = (folder / manifest.image_store).resolve()
    index = Hashed(store / "store.json", manifest.image_store_sha256, f"{folder.name}/manifest.json")
    index.check()
    shards = [Hashed(store / shard.name, shard.sha256, "store.json") for shard in ImageStore(store).shards]
    return [*files, index, *shards]


def _check_sums(path: Path) -> None:
    """Check a file against the hash beside it; a step writes both anew wherever they are not what it would write."""
    sums = path.with_suffix(".sha256")
    for file in (path, sums):
        if not file.is_file():
            raise UserError(f"{file}: missing; {RERUN}")
    if sums.read_bytes() != sha256_line(sha256_file(path), path.name):
        raise UserError(f"{path}: differs from {sums.name} (damaged or edited); {RERUN}")


def _check_all(checks: Sequence[Callable[[], None]]) -> None:
    """Run checks in threads: hashing and reading leave the interpreter free."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting = iter(checks)
        while some := list(islice(waiting, 1024)):  # a failure is named soon, and in order
            for _ in pool.map(lambda check: check(), some):
                pass


def _check_tokenizer(folder: Path, packs: Sequence[Path]) -> None:
    """Check the tokenizer of the next run against the copies beside the packs, which are hashed, and its origin."""
    copies = [entry for pack in packs for entry in Manifest.load(pack).files if entry.name.startswith("tokenizer/")]
    for name in sorted({entry.name for entry in copies}):
        path = folder.parent / name
        if not path.is_file() or sha256_file(path) not in {entry.sha256 for entry in copies if entry.name == name}:
            raise UserError(f"{path}: not the tokenizer that the packs were made with; {REBUILD}")
    _check_own_hash(folder / "origin.json")
    trained = folder / "trained.model"
    if trained.is_file() and sha256_file(trained) != sha256_file(folder / "tokenizer.model"):
        raise UserError(f"{trained}: differs from tokenizer.model (damaged or edited); delete it")


def _check_own_hash(path: Path) -> None:
    """Check a file made by ``workspace.sealed``."""
    if read_hashed(path) is None:
        raise UserError(f"{path}: missing or damaged; {REBUILD}")


def find_shard_outputs(directory: Path) -> list[ShardOutput]:
    """Return the done units of an output folder, of all settings that were ever used with this version of mma-prep."""
    markers = sorted(directory.glob("ingest/*/*/*.json"))
    outputs = [
        ShardOutput(marker.parents[1].name, marker.name.removesuffix(".json"), marker.parent, "") for marker in markers
    ]
    return [output for output in outputs if not output.is_outdated()]


def check_shard_output(output: ShardOutput, stores: Path) -> None:
    """Check one unit of ingest: its marker, what the marker lists, and its rows of sealed stores. Raises UserError."""
    report = output.report()
    for path, sha256 in (
        (output.tokens, report.sha256),
        (output.stats, report.stats_sha256),
        (output.image_hashes, report.images_sha256),
        (output.rejects, report.rejects_sha256),
        (output.sources, report.sources_sha256),
    ):
        Hashed(path, sha256, output.marker.name).check()
    if output.images.is_file():  # no store holds them yet
        Hashed(output.images, report.pixels.sha256, output.marker.name).check()
    for path in output.row_files():
        key = path.name.rpartition("-")[2]
        if (stores / key / "store.json").is_file():
            _check_rows(output, path, ImageStore(stores / key))


def check_tokens(outputs: Sequence[ShardOutput]) -> None:
    """Check the tokens of units against their markers, before rows are made of them. Raises UserError."""
    _check_all([functools.partial(_check_tokens, output) for output in outputs])


def _check_tokens(output: ShardOutput) -> None:
    Hashed(output.tokens, output.report().sha256, output.marker.name).check()


def _check_rows(output: ShardOutput, path: Path, store: ImageStore) -> None:
    """Check that each image of a unit lies where its rows say."""
    image_hashes = ImageHashes.open(output.image_hashes)
    data = path.read_bytes()
    rows = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.int64)
    if len(data) != 8 * len(image_hashes.sha256) or (len(rows) and not (rows.min() >= 0 and rows.max() < len(store))):
        wrong = True
    else:
        found = store.hashes(rows[image_hashes.index])
        wrong = bool((found != image_hashes.sha256).any())
    if wrong:
        raise UserError(f"{path}: not the rows of {store.directory.name}/store.json; {REBUILD}")
