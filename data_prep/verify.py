"""Hash everything that a run will read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.images import ImageStore
from data_prep.packs import PackReader, sha256_file
from data_prep.tokenizer import Tokenizer


def pack_folders(directory: Path) -> list[Path]:
    """Return ``directory`` if it is a pack folder, else the pack folders in it. Raises UserError for none."""
    if (directory / "manifest.json").is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob("packs/*/manifest.json"))
    if not found:
        raise UserError(f"{directory}: neither a pack folder nor an output folder of mma-prep (no manifest.json)")
    return found


def verify(directory: Path) -> Iterator[str]:
    """Check every hash of one pack folder or of all in an output folder; yield a line for each that is whole.

    Raises:
        UserError: naming the first file that is missing or altered.
    """
    checked: set[Path] = set()
    for folder in pack_folders(directory):
        reader = PackReader(folder, verify=True)
        manifest = reader.manifest
        if manifest.plan_sha256 != sha256_file(folder / "plan.arrow"):
            raise UserError(f"{folder / 'plan.arrow'}: not the plan that the rows follow; run mma-prep again")
        if Tokenizer.load(folder / manifest.tokenizer).sha256 != manifest.tokenizer_sha256:
            raise UserError(
                f"{folder / manifest.tokenizer}: not the tokenizer the rows were made with; run mma-prep again"
            )
        store_path = (folder / manifest.image_store).resolve()
        if manifest.image_store and store_path not in checked:
            store = ImageStore(store_path)
            store.verify()
            checked.add(store_path)
            yield f"{store_path.name}: image store whole, {len(store):,} images"
        if manifest.image_store and ImageStore(store_path).identity != manifest.image_store_sha256:
            raise UserError(f"{store_path}: not the image store the rows were made with; run mma-prep again")
        yield f"{folder}: whole, {manifest.rows:,} rows, plan {manifest.plan_sha256[:12]}"
