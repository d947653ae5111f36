"""``manifest.json`` of a checkpoint: a typed model with a hash of its own, validated before use.

A checkpoint may be untrusted. Every number is a bounded integer, every file name is one that this format writes, and
nothing can refer to a path outside the folder.
"""

from __future__ import annotations

import json
import re
import stat
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_prep.common.errors import UserError
from data_prep.common.validation import first_problem

FORMAT: Final = "mma-checkpoint"
VERSION: Final = 4
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_MAX_BYTES = 1 << 28
_BEFORE_HASH, _AFTER_HASH = b',\n "xxh3": "', b'"\n}\n'
_HASH_CHARS = 32
_RANK_FILE = re.compile(r"rank-(\d{5,7})\.safetensors")
_TOKENIZER_FILE = re.compile(rf"{TOKENIZER}/(?!\.\.?$)[^/\\\0]+")
_STRICT = ConfigDict(strict=True, extra="forbid")
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Ranks = Annotated[int, Field(gt=0, lt=1 << 20)]


@dataclass(frozen=True, config=_STRICT)
class ParamEntry:
    """One parameter of the model: its full shape, the stage that holds it, and whether it trains."""

    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    stage: Count
    trained: bool
    stored: bool = True
    """False: its value is in the base weights."""


@dataclass(frozen=True, config=_STRICT)
class FileDigest:
    """One file of a checkpoint: its size in bytes and its xxh3-128 in hex."""

    bytes: Count
    xxh3: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True, config=_STRICT)
class BaseWeights:
    """Where weights that a run does not train lie, outside the checkpoint: LoRA saves its adapters alone."""

    kind: Annotated[str, Field(pattern=r"^(llm|vision|extra_vision\.[0-9]{1,3}|export|checkpoint)$")]
    """Hugging Face folder of the language model or of a tower; a model folder of `mma export`; a checkpoint."""
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")], FileDigest]
    """Its weight files, by name: reading them is refused when one has changed."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointManifest:
    """Everything in a checkpoint except tensors."""

    step: Count
    """Optimizer steps taken, skipped ones included."""
    optimizer_steps: Count
    """Updates that AdamW applied."""
    consumed_packs: Count
    plan_sha256: str
    """Identity of the order of rows; resuming on another is refused."""
    global_batch_size: Count
    pp: Ranks
    dp: Ranks
    config: dict[str, Any]
    model: dict[str, Any]
    """What export needs to rebuild the model (see `pipeline.model.spec`)."""
    base: tuple[BaseWeights, ...] = ()
    """What holds the parameters that are not stored."""
    params: dict[str, ParamEntry] = field(default_factory=dict)
    files: dict[str, FileDigest] = field(default_factory=dict)
    """By name: ``rank-NNNNN.safetensors`` of every rank, and ``tokenizer/NAME``."""
    format: Literal["mma-checkpoint"] = FORMAT
    version: Literal[4] = VERSION

    def to_json(self) -> str:
        """Return the content of ``manifest.json``."""
        return hashed_json(asdict(self))


_MANIFEST = TypeAdapter(CheckpointManifest)


def hashed_json(values: dict[str, Any]) -> str:
    """Return a non-empty object as JSON whose last key, ``xxh3``, is the hash of everything before its value."""
    before = json.dumps(values, indent=1).removesuffix("\n}").encode() + _BEFORE_HASH
    return (before + xxhash.xxh3_128_hexdigest(before).encode() + _AFTER_HASH).decode()


def _without_hash(content: bytes) -> bytes:
    """Return JSON without its hash; content without a hash is returned as it is. Raises ValueError if it is damaged."""
    digest_at = len(content) - len(_AFTER_HASH) - _HASH_CHARS
    before, digest = content[: max(digest_at, 0)], content[max(digest_at, 0) :].removesuffix(_AFTER_HASH)
    if not (content.endswith(_AFTER_HASH) and before.endswith(_BEFORE_HASH)):
        return content
    if xxhash.xxh3_128_hexdigest(before).encode() != digest:
        raise ValueError(f"{MANIFEST} is damaged: its hash differs")
    return before.removesuffix(_BEFORE_HASH) + b"\n}"


def rank_file(rank: int) -> str:
    """Return the file name of one rank's shards."""
    return f"rank-{rank:05d}.safetensors"


def is_plain_file(path: Path) -> bool:
    """Whether a path is a regular file: not a link, which may lead elsewhere, nor a pipe, which may never end."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_manifest(folder: Path) -> tuple[CheckpointManifest, str]:
    """Read and validate the manifest of a checkpoint folder; return it with its hash.

    Raises UserError when it is damaged or not valid.
    """
    path = folder / MANIFEST
    try:
        if not is_plain_file(path):
            raise ValueError(f"{MANIFEST} is missing or not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{MANIFEST} is larger than {_MAX_BYTES >> 20} MiB")
        content = path.read_bytes()
        plain = _without_hash(content)
        manifest = _MANIFEST.validate_json(plain)
        if plain == content:
            raise ValueError(f"{MANIFEST} has no hash")
        _check(manifest)
    except ValidationError as error:
        raise UserError(f"{folder} is not an intact checkpoint ({_fault(error)})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an intact checkpoint ({error})") from error
    return manifest, content[-len(_AFTER_HASH) - _HASH_CHARS : -len(_AFTER_HASH)].decode()


def _fault(error: ValidationError) -> str:
    for problem in error.errors():
        if problem["loc"] == ("xxh3",):
            return f"{MANIFEST} is damaged: its hash is not where it was written"
        if problem["loc"] == ("version",):
            return f"{FORMAT} version {problem['input']}, this release reads version {VERSION}"
    return first_problem(error)


def _check(manifest: CheckpointManifest) -> None:
    """Check the constraints between fields. Raises ValueError."""
    for name in manifest.files:
        if not _RANK_FILE.fullmatch(name) and not _TOKENIZER_FILE.fullmatch(name):
            raise ValueError(f"a checkpoint has no file named {name!r}")
    ranks = {name for name in manifest.files if _RANK_FILE.fullmatch(name)}
    world = manifest.pp * manifest.dp
    if len(ranks) != world or not ranks.issuperset(rank_file(rank) for rank in range(world)):
        raise ValueError(f"{len(ranks)} rank files, but {manifest.pp} stages x {manifest.dp} data-parallel ranks")
    for name, entry in manifest.params.items():
        if entry.stage >= manifest.pp:
            raise ValueError(f"{name} is on stage {entry.stage}, but there are {manifest.pp} stages")
    spec = manifest.model.get("spec")
    if not isinstance(spec, dict) or not isinstance(spec.get("llm"), dict):
        raise ValueError("model: the description of the language model is missing")
