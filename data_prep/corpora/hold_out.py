"""Held-out parts of any corpus: ``hold_out`` and ``part``.

The part of a sample depends on its images alone, so all samples about one image are on the same side, whatever their
order, their file or their question. A sample without images is placed by its id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_prep.corpora.base import Corpus, Input
from data_prep.example import Example, ImageRef, Reject


class HoldOut(Corpus):
    """One part of another corpus."""

    hold_out: float = Field(gt=0, lt=1)
    """Share of the images whose samples are kept for evaluation, such as 0.05; the same share names the same images."""
    part: Literal["train", "held_out"] = "train"
    """With ``hold_out``: which part this corpus is. Rejected samples are counted in ``train`` only."""
    whole: Any = Field(exclude=True)
    """Reader of the whole corpus."""

    @property
    def never_augment(self) -> str:
        """Why the images must not be changed, as the whole corpus says."""
        return str(self.whole.never_augment)

    def shards(self) -> Sequence[str]:
        """Return the shards of the whole corpus."""
        shards: Sequence[str] = self.whole.shards()
        return shards

    def files(self) -> Sequence[Path]:
        """Return the raw files of the whole corpus."""
        files: Sequence[Path] = self.whole.files()
        return files

    def check_files(self) -> None:
        """Check the raw files of the whole corpus. Raises UserError."""
        self.whole.check_files()

    def files_of(self, shard: str) -> Sequence[Path]:
        """Return the raw files of a shard."""
        files: Sequence[Path] = self.whole.files_of(shard)
        return files

    def inputs(self) -> dict[str, tuple[Input, Path]]:
        """Return the path options of the whole corpus."""
        inputs: dict[str, tuple[Input, Path]] = self.whole.inputs()
        return inputs

    def probe(self, count: int) -> Iterator[Example | Reject]:
        """Yield the outcomes of a few samples of the whole corpus."""
        yield from self.whole.probe(count)

    def examples(self, shard: str) -> Iterator[Example | Reject]:
        """Yield the samples of this part."""
        for item in self.whole.examples(shard):
            if isinstance(item, Reject):
                if self.part == "train":
                    yield item
            elif self._is_held_out(item) == (self.part == "held_out"):
                yield item

    def _is_held_out(self, example: Example) -> bool:
        # By the first image: samples that share it stay together, and most samples have one.
        key = _identity(example.images[0]) if example.images else example.id.encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < self.hold_out * 2**64


def _identity(image: ImageRef) -> bytes:
    """Return what identifies an image: its bytes where a row holds them, else its name."""
    return image.data if image.data is not None else image.name.encode(errors="surrogatepass")
