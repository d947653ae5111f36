"""Weights in safetensors: the header and the tensors it describes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import save

from pipeline.model.weights import TensorFolder
from tests.fuzz.files import as_file

DICTIONARY = (
    *(b'"F32"', b'"I64"', b'"BF16"', b'"F8_E4M3"', b'"shape":[', b'"data_offsets":[0,9999999]', b"-1", b"[" * 2000),
    *(b"18446744073709551615", b'"__metadata__":{"a":1},', (1 << 40).to_bytes(8, "little"), bytes(8)),
)


def run(data: bytes) -> None:
    """Read every tensor of a file."""
    folder = TensorFolder(as_file(data, "model.safetensors").parent)
    try:
        for key in folder.files:
            folder.read(key)
    finally:
        folder.close()


def seeds() -> Iterator[bytes]:
    """Yield two small files."""
    yield save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})
    yield save({"empty": torch.zeros(0, 3), "scalar": torch.tensor(1)})
