"""The manifest of a checkpoint, as it is and with a hash that fits it."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from data_prep.common.errors import UserError
from pipeline.checkpoints.manifest import CheckpointManifest, FileDigest, ParamEntry, rank_file, read_manifest
from tests.fuzz.files import as_file
from tests.fuzz.targets.pack_manifest import DICTIONARY as NUMBERS

DICTIONARY = (*NUMBERS, b"rank-00001.safetensors", b"tokenizer/../x", b'"spec": {}')


def run(data: bytes) -> None:
    """Read a manifest; with its hash renewed, its content is looked at too."""
    before = data.rpartition(b',\n "xxh3"')[0] + b',\n "xxh3": "'
    hashed = before + xxhash.xxh3_128_hexdigest(before).encode() + b'"\n}\n'
    for content in (data, hashed):
        try:
            read_manifest(as_file(content, "manifest.json").parent)
        except UserError:
            continue


def seeds() -> Iterator[bytes]:
    """Yield the manifest of a small checkpoint."""
    files = {rank_file(rank): FileDigest(100, "0" * 32) for rank in range(2)}
    manifest = CheckpointManifest(
        step=3, optimizer_steps=3, consumed_packs=12, plan_sha256="0", global_batch_size=4, pp=1, dp=2, config={"a": 1},
        model={"spec": {"llm": {}}, "tokenizer_sha256": "0"}, params={"w": ParamEntry((7,), 0, True)}, files=files,
    )  # fmt: skip
    yield manifest.to_json().encode()
