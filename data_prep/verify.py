"""Hashes every file of an output folder and names the first that is missing or altered.

The chain of hashes: ``manifest.sha256`` -> ``manifest.json`` -> rows, plan, tokenizer, image store index -> its shards.
In an output folder, each done-marker of ingest holds its own hash and those of its files, and the list of rejected
samples has its hash beside it. Not covered: the event ledger, and the intermediate files of running steps (``.work``),
which carry their own hash or are rewritten before use.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import REBUILD, RERUN, Hashed, check_sums, read_hashed, sha256_file
from data_prep.common.store_index import INDEX_FILE
from data_prep.images.store import ImageStore
from data_prep.ingest.changes import LISTING
from data_prep.ingest.image_hashes import ImageHashes
from data_prep.ingest.store_rows import read_store_rows
from data_prep.ingest.workspace import ShardOutput
from data_prep.packs import Manifest


def pack_folders(directory: Path) -> list[Path]:
    """Return ``directory`` if it is a pack folder, else the pack folders in it. Raises UserError if there are none."""
    if (directory / "manifest.json").is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob("packs/*/manifest.json"))
    if not found:
        raise UserError(f"{directory}: neither a pack folder nor an output folder of mma-prep (no manifest.json)")
    return found


def verify(directory: Path) -> Iterator[str]:
    """Check every hash of one pack folder, or of all in an output folder; yield a line for each intact part.

    In an output folder, the inputs of its next run are checked, too: ingest outputs and tokenizer.

    Raises:
        UserError: naming the first file that is missing or altered.
    """
    checked: set[Path] = set()
    begun = [path.parent for path in directory.glob("packs/*/manifest.sha256")]
    for folder in sorted({*pack_folders(directory), *begun}):
        files = pack_files(folder)
        _check_all([file.check for file in files if file.path not in checked])
        manifest = Manifest.load(folder)
        _check_sums(folder / "plan.arrow")
        if manifest.image_store:
            store = (folder / manifest.image_store).resolve()
            if store / INDEX_FILE not in checked:
                _check_sums(store / INDEX_FILE)
                yield f"{store.name}: ok, image store of {len(ImageStore(store)):,} images"
        checked.update(file.path for file in files)
        yield f"{folder}: ok, {manifest.rows:,} rows, plan {manifest.plan_sha256[:12]}"
    outputs = find_shard_outputs(directory)
    if outputs:
        _check_all([functools.partial(check_shard_output, output, directory / "images") for output in outputs])
        _check_sums(directory / "rejects.jsonl")
        for path in sorted([*directory.glob("ingest/*/shards-*.json"), *directory.glob(f"ingest/*/{LISTING}")]):
            _check_own_hash(path)
        yield f"{directory / 'ingest'}: ok, {len(outputs):,} ingested shards"
    if (directory / "tokenizer").is_dir():
        _check_tokenizer(directory / "tokenizer", pack_folders(directory))


def verify_share(folder: Path, share: int, shares: int) -> None:
    """Check one of several equal shares of the files a trainer reads: pack files and image store.

    Raises:
        UserError: naming a file of this share that is missing or altered.
    """
    for file in sorted(pack_files(folder), key=_size, reverse=True)[share::shares]:
        file.check()


def _size(file: Hashed) -> tuple[int, str]:
    return (file.path.stat().st_size if file.path.is_file() else 0), str(file.path)


def pack_files(folder: Path) -> list[Hashed]:
    """Return the files of a pack folder and its image store. Raises UserError if a file list is damaged."""
    _check_sums(folder / "manifest.json")
    manifest = Manifest.load(folder)
    files = [Hashed(folder / entry.name, entry.sha256, "manifest.json") for entry in manifest.files]
    hashes = {file.path.name: file.sha256 for file in files}
    if hashes.get("plan.arrow") != manifest.plan_sha256:
        raise UserError(f"{folder / 'plan.arrow'}: not the plan of these rows; run mma-prep again")
    if not manifest.image_store:
        return files
    store = (folder / manifest.image_store).resolve()
    index = Hashed(store / "store.json", manifest.image_store_sha256, f"{folder.name}/manifest.json")
    index.check()
    shards = [Hashed(store / shard.name, shard.sha256, "store.json") for shard in ImageStore(store).shards]
    return [*files, index, *shards]


def _check_sums(path: Path) -> None:
    """Check a file against the hash beside it; a step rewrites both if they differ from its result."""
    if not path.is_file():
        raise UserError(f"{path}: missing; {RERUN}")
    check_sums(path, sha256_file(path), required=True)


def _check_all(checks: Sequence[Callable[[], None]]) -> None:
    """Run checks in threads: hashing and reading release the GIL."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting = iter(checks)
        while some := list(islice(waiting, 1024)):  # failures come early and in order
            for _ in pool.map(lambda check: check(), some):
                pass


def _check_tokenizer(folder: Path, packs: Sequence[Path]) -> None:
    """Check the tokenizer of the next run against its hashed copies in the pack folders, and its origin."""
    copies = [entry for pack in packs for entry in Manifest.load(pack).files if entry.name.startswith("tokenizer/")]
    for name in sorted({entry.name for entry in copies}):
        path = folder.parent / name
        if not path.is_file() or sha256_file(path) not in {entry.sha256 for entry in copies if entry.name == name}:
            raise UserError(f"{path}: not the tokenizer of the packs; {REBUILD}")
    _check_own_hash(folder / "origin.json")
    trained = folder / "trained.model"
    if trained.is_file() and sha256_file(trained) != sha256_file(folder / "tokenizer.model"):
        raise UserError(f"{trained}: differs from tokenizer.model (damaged or edited); delete it")


def _check_own_hash(path: Path) -> None:
    """Check a file written by ``with_hash``."""
    if read_hashed(path) is None:
        raise UserError(f"{path}: missing or damaged; {REBUILD}")


def find_shard_outputs(directory: Path) -> list[ShardOutput]:
    """Return the complete shard outputs of an output folder, for all settings used with this version of mma-prep."""
    markers = sorted(directory.glob("ingest/*/*/*.json"))
    outputs = [
        ShardOutput(marker.parents[1].name, marker.name.removesuffix(".json"), marker.parent, "") for marker in markers
    ]
    return [output for output in outputs if not output.is_outdated()]


def check_shard_output(output: ShardOutput, stores: Path) -> None:
    """Check one shard output: its marker, the files it lists, and its image store rows. Raises UserError."""
    report = output.report()
    for path, sha256 in (
        (output.tokens, report.sha256),
        (output.stats, report.stats_sha256),
        (output.image_hashes, report.images_sha256),
        (output.rejects, report.rejects_sha256),
        (output.sources, report.sources_sha256),
    ):
        Hashed(path, sha256, output.marker.name).check()
    if output.images.is_file():  # not in a store yet
        Hashed(output.images, report.pixels.sha256, output.marker.name).check()
    for path in output.row_files():
        key = path.name.rpartition("-")[2]
        if (stores / key / "store.json").is_file():
            _check_rows(output, path, ImageStore(stores / key))


def check_tokens(outputs: Sequence[ShardOutput]) -> None:
    """Check the tokens of shard outputs against their markers before rows are made from them. Raises UserError."""
    _check_all([functools.partial(_check_tokens, output) for output in outputs])


def _check_tokens(output: ShardOutput) -> None:
    Hashed(output.tokens, output.report().sha256, output.marker.name).check()


def _check_rows(output: ShardOutput, path: Path, store: ImageStore) -> None:
    """Check that the store holds every image of a shard output at its recorded row."""
    image_hashes, rows = ImageHashes.open(output.image_hashes), read_store_rows(path)
    fits = len(rows) == len(image_hashes.sha256) and not (len(rows) and (rows.min() < 0 or rows.max() >= len(store)))
    if not fits or (store.hashes(rows[image_hashes.index]) != image_hashes.sha256).any():
        raise UserError(f"{path}: does not match {store.directory.name}/store.json; {REBUILD}")
