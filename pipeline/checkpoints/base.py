"""Base weights of a run with LoRA: its checkpoints hold what it trains, and name and hash the files of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash

from data_prep.common.errors import UserError
from pipeline.checkpoints.manifest import MANIFEST, BaseWeights, FileDigest, is_plain_file
from pipeline.model.spec import ModelSpec
from pipeline.model.weights import INDEX, WeightSource


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file in hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weight_files(kind: str, folder: Path) -> list[Path]:
    """Return the files that determine the weights of a folder; a checkpoint's manifest has the hash of every other."""
    if kind == "checkpoint":
        return [folder / MANIFEST]
    return sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX)])


def digests(files: Iterable[Path]) -> dict[str, FileDigest]:
    """Hash files. Raises UserError when one cannot be read."""
    try:
        return {path.name: FileDigest(path.stat().st_size, hash_file(path)) for path in files}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): copy the weights again") from error


def base_weights(kind: str, folder: Path | str, files: Mapping[str, FileDigest]) -> BaseWeights:
    """Return what a manifest says about base weights."""
    return BaseWeights(kind, str(Path(folder).resolve()), dict(sorted(files.items())))


def base_faults(base: BaseWeights, *, rank: int = 0, world: int = 1) -> list[str]:
    """Hash this rank's share of the files; return a line for each that is missing or has changed."""
    lines, fix = [], "restore it"
    for name in sorted(base.files)[rank::world]:
        path, entry = Path(base.path) / name, base.files[name]
        what = f"{path}, which holds base weights of the run with LoRA,"
        try:
            if not is_plain_file(path.resolve()):  # the hub's folders hold links
                lines.append(f"{what} is missing: {fix}")
            elif path.stat().st_size != entry.bytes or hash_file(path) != entry.xxh3:
                lines.append(f"{what} has changed: {fix}")
        except OSError as error:
            lines.append(f"{what} cannot be read ({error.strerror}): {fix}")
    return lines


def open_source(spec: ModelSpec, bases: Iterable[BaseWeights]) -> WeightSource | None:
    """Open base weights that are folders of models; None if there are none. Raises UserError as `WeightSource` does."""
    paths = {base.kind: base.path for base in bases}
    if "export" in paths:
        return WeightSource.open_export(spec, paths["export"])
    extra = tuple(
        replace(tower, source=paths.get(f"extra_vision.{place}", "")) for place, tower in enumerate(spec.extra_towers)
    )
    if spec.start is not None and "start" in paths:
        return WeightSource.open(replace(spec, start=replace(spec.start, source=paths["start"])))
    llm, vision = paths.get("llm", ""), paths.get("vision", "")
    return WeightSource.open(replace(spec, llm_source=llm, vision_source=vision, extra_towers=extra))
