"""The index of sharded weights."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.model.weights import TensorFolder
from tests.fuzz.files import as_file

DICTIONARY = (
    b'"../x"',
    b'"/etc/passwd"',
    b"null",
    b"{}",
    b"[]",
    b"1",
    b'"\\u0000"',
    b"[" * 3000,
    b'{"a":' * 2000,
    b'"' + b"x" * 5000 + b'"',
)


def run(data: bytes) -> None:
    """Read an index whose shard does not exist."""
    TensorFolder(as_file(data, "model.safetensors.index.json").parent)


def seeds() -> Iterator[bytes]:
    """Yield a small index."""
    yield b'{"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    yield b'{"weight_map": {}}'
