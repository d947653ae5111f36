"""Hashes of every file of an export: written with it, and checked before anything in it is used.

``mma_files.json`` lists each file with its size and one xxh3-128 hash per MiB, and carries its own sha256. The hashes
find damage (a flipped bit, a torn copy), not forgery: whoever rewrites the list can rewrite the files.

The quick check reads every small file in full, the header of every weight file, and a random sample of the rest; it
reports how much it covered. The full check reads every byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import hash_json
from data_prep.common.validation import first_problem

FILES: Final = "mma_files.json"
FORMAT: Final = "mma-export-files"
VERSION: Final = 1
BLOCK_BYTES = 1 << 20
SMALL_FILE_BYTES = 16 << 20
"""Files up to this size are always hashed in full."""
SAMPLED_BLOCKS = 64
"""Blocks that a quick check hashes, shared by the larger files, besides their headers and last blocks."""
CARD: Final = "README.md"
"""The model card is not hashed: it is read by people, who may add to it."""
_MAX_LIST_BYTES = 256 << 20
_FIX = "copy the export again, or export the run again"
_STRICT = ConfigDict(strict=True, extra="forbid")


@checked_dataclass(frozen=True, config=_STRICT)
class HashedFile:
    """One file of an export."""

    bytes: Annotated[int, Field(ge=0, lt=1 << 53)]
    blocks: list[Annotated[str, Field(pattern="^[0-9a-f]{32}$")]]
    """xxh3-128 of every block of ``BLOCK_BYTES``, in hex."""


@checked_dataclass(frozen=True, config=_STRICT)
class FileList:
    """The content of ``mma_files.json``; names are relative to the folder, with ``/``."""

    files: dict[Annotated[str, Field(pattern=r"^(tokenizer/)?[\w-][\w.-]*$")], HashedFile]
    format: Literal["mma-export-files"] = FORMAT
    version: Literal[1] = VERSION


@dataclass(frozen=True)
class Coverage:
    """How much of an export a check has read."""

    checked_bytes: int
    total_bytes: int

    @property
    def complete(self) -> bool:
        """Whether every byte was hashed."""
        return self.checked_bytes == self.total_bytes

    def __str__(self) -> str:
        if self.complete:
            return f"all {_mib(self.total_bytes)} checked"
        return f"sizes, headers and {_mib(self.checked_bytes)} of {_mib(self.total_bytes)} checked"


_LIST = TypeAdapter(FileList)


def write_file_hashes(folder: Path) -> Path:
    """Hash every file of a finished export folder and write the list beside them; return its path."""
    files = {
        str(path.relative_to(folder)): HashedFile(path.stat().st_size, list(_hashes(path, None)))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (FILES, CARD)
    }
    value = asdict(FileList(files))
    target = folder / FILES
    target.write_text(json.dumps({"value": value, "sha256": hash_json(value)}) + "\n", encoding="utf-8")
    return target


def check_files(folder: Path, *, full: bool = False, sample: random.Random | None = None) -> Coverage:
    """Compare an export folder with its list.

    Args:
        folder: the export.
        full: hash every byte; else small files, headers and a sample.
        sample: chooses the sampled blocks; default: a different choice at every call.

    Returns:
        How many bytes were hashed.

    Raises:
        UserError: naming the first file that is missing, damaged or not listed, or the damaged list itself.
    """
    listed = read_file_list(folder).files
    _refuse_unlisted(folder, listed)
    for name, entry in listed.items():
        _check_size(folder / name, entry)
    large = sum(len(entry.blocks) for entry in listed.values() if entry.bytes > SMALL_FILE_BYTES)
    checked, sample = 0, sample or random.Random()
    for name, entry in listed.items():
        share = -(-SAMPLED_BLOCKS * len(entry.blocks) // large) if large else 0
        wanted = None if full or entry.bytes <= SMALL_FILE_BYTES else _sampled(folder / name, entry, share, sample)
        checked += _check_blocks(folder / name, entry, wanted)
    return Coverage(checked, sum(entry.bytes for entry in listed.values()))


def read_file_list(folder: Path) -> FileList:
    """Read ``mma_files.json``. Raises UserError when it is missing, damaged or of another version."""
    path = folder / FILES
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_LIST_BYTES + 1)
        if len(data) > _MAX_LIST_BYTES:
            raise ValueError(f"larger than {_mib(_MAX_LIST_BYTES)}")
        raw = json.loads(data)
        if raw["sha256"] != hash_json(raw["value"]):
            raise ValueError("its own hash differs")
        return _LIST.validate_json(json.dumps(raw["value"]))  # JSON mode: strict python mode takes no dict
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {_FIX}") from error
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}): {_FIX}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {_FIX}") from error


def check_finite(folder: Path) -> None:
    """Read every tensor of an export, one at a time. Raises UserError naming the first that is not finite."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if problem := not_finite(tensors.get_tensor(name)):
                        raise UserError(f"{path}: {name} {problem}: export a checkpoint from before the run diverged")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): {_FIX}") from error


def not_finite(tensor: torch.Tensor) -> str:
    """Return what makes a floating tensor unusable, such as ``has 3 values of 4096 that are not finite``, or ``""``."""
    if not tensor.numel() or not tensor.is_floating_point():
        return ""
    low, high = torch.aminmax(tensor)  # one pass without a temporary; NaN propagates
    if torch.isfinite(low) and torch.isfinite(high):
        return ""
    bad = int((~torch.isfinite(tensor)).sum())
    return f"has {bad:,} of {tensor.numel():,} values that are not finite"


def _refuse_unlisted(folder: Path, listed: Mapping[str, Any]) -> None:
    """Refuse files that loading would read but the list does not hold: an older tokenizer, shards of another export."""
    read = [
        *folder.glob("*.safetensors*"),
        *folder.glob("*config.json"),
        *folder.glob("*.py"),
        *(folder / "tokenizer").glob("*"),
    ]
    for path in sorted(read):
        if str(path.relative_to(folder)) not in listed:
            raise UserError(f"{path} is not listed in {FILES}: remove it, or export the run again")


def _check_size(path: Path, entry: HashedFile) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: {_FIX}")
    if (size := path.stat().st_size) != entry.bytes:
        raise UserError(f"{path} is damaged ({size:,} bytes, {entry.bytes:,} expected): {_FIX}")


def _check_blocks(path: Path, entry: HashedFile, wanted: list[int] | None) -> int:
    """Hash the wanted blocks of a file, None for all; return the bytes hashed. Raises UserError."""
    numbers = list(range(len(entry.blocks))) if wanted is None else wanted
    try:
        for number, found in zip(numbers, _hashes(path, wanted), strict=True):
            if found != entry.blocks[number]:
                raise UserError(f"{path} is damaged (MiB {number + 1} of {len(entry.blocks)} differs): {_FIX}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_FIX}") from error
    return sum(min(BLOCK_BYTES, entry.bytes - number * BLOCK_BYTES) for number in numbers)


def _sampled(path: Path, entry: HashedFile, share: int, sample: random.Random) -> list[int]:
    """Return the blocks a quick check hashes: those of the safetensors header, the last, and ``share`` others."""
    with path.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    blocks = len(entry.blocks)
    wanted = {*range(min(-(-header // BLOCK_BYTES), blocks)), 0, blocks - 1}
    return sorted(wanted | set(sample.sample(range(blocks), min(share, blocks))))


def _hashes(path: Path, wanted: list[int] | None) -> Iterator[str]:
    """Yield the hash of each wanted block of a file, None for all of them in order."""
    with path.open("rb") as stream:
        if wanted is None:
            while block := stream.read(BLOCK_BYTES):
                yield xxhash.xxh3_128_hexdigest(block)
            return
        for number in wanted:
            stream.seek(number * BLOCK_BYTES)
            yield xxhash.xxh3_128_hexdigest(stream.read(BLOCK_BYTES))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
