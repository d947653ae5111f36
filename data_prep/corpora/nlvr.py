"""Cornell NLVR: sentences about three boxes of coloured shapes, as captions or as true-or-false questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import ask, key_text, require, slot, text
from data_prep.corpora.tables import json_lines
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample

COLOURS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
SIZES = {10: "small", 20: "medium", 30: "big"}


class NLVR(RowCorpus):
    """``{sentence, label, identifier, directory, structured_rep}`` a line; images ``SPLIT-IDENTIFIER-k.png``.

    Every example is published in six pictures that differ in the order of the boxes only. ``groups`` are the
    numbered image folders: the corpus' own cross-validation splits, which keep all pictures of one presentation
    together. The hidden split names no folder, so images are found by their name.
    """

    sentences: RawFile = Path("dev/dev.json")
    """The JSON-lines file of a split."""
    images: RawFolder = Path("dev/images")
    """Folder of the numbered image folders."""
    task: Literal["verify", "caption"] = "verify"
    """``verify``: is the sentence true of the picture? ``caption``: describe the picture, from its structured_rep."""
    groups: tuple[str, ...] | None = None
    """Use these image folders only, for example ``["0"]``."""
    exclude_groups: tuple[str, ...] = ()
    """Leave these image folders out."""
    permutations: Annotated[int, Field(ge=1, le=6)] = 1
    """How many of the six pictures to use; a sentence that lacks one of them is rejected."""
    prompt: Annotated[str, slot("sentence")] = "{sentence} True or false?"
    """What the user says when a sentence is verified."""
    answers: tuple[str, str] = ("true", "false")
    """The words for a true and for a false sentence."""

    @property
    def never_augment(self) -> str:
        """Why the images must be shown as they are."""
        return "its sentences are about places and counts"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_lines(self.root / self.sentences)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        """Where each image lies, by its file name."""
        return {path.name: path for path in sorted((self.root / self.images).glob("*/*.png")) if not path.is_symlink()}

    def row_id(self, row: Row) -> str:
        """Return the identifier ``n-m``."""
        return key_text(row, "identifier")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return one example for each picture used; none where the pictures lie in another group."""
        for permutation in range(self.permutations):
            name = f"{self.sentences.stem}-{sample}-{permutation}.png"
            if name not in self._by_name:
                raise BadSample("missing-image", f"no {name} in any folder of {self.images}")
            path = self._by_name[name]
            group = path.parent.name
            if group not in self.exclude_groups and (self.groups is None or group in self.groups):
                yield self._example(row, f"{sample}-{permutation}", ImageRef(name, path=path))

    def _example(self, row: Row, sample: str, image: ImageRef) -> Example:
        if self.task == "caption":
            caption = describe_boxes(require(row, "structured_rep", list))
            return Example(sample, (Turn("user", (image,)), Turn("assistant", (caption,))), kind="document")
        sentence, label = text(row, "sentence"), text(row, "label")
        if label not in ("true", "false"):
            raise BadSample("bad-label", f"label is {label!r}, expected true or false")
        answer = self.answers[0 if label == "true" else 1]
        return ask(sample, [image], self.prompt.replace("{sentence}", sentence), answer, family="nlvr")


def describe_boxes(boxes: Sequence[object]) -> str:
    """Return ``a box with 1 small blue circle and 2 big yellow squares, an empty box, ...``: true in any order."""
    if not boxes or not all(isinstance(box, list) for box in boxes):
        raise BadSample("missing-key", "structured_rep is no list of boxes")
    return ", ".join(_describe_box(box) for box in boxes if isinstance(box, list))


def _describe_box(objects: Sequence[object]) -> str:
    counts = Counter(_name(item) for item in objects)
    held = [f"{number} {name}{'s' * (number > 1)}" for name, number in sorted(counts.items())]
    return f"a box with {' and '.join(held)}" if held else "an empty box"


def _name(item: object) -> str:
    if not isinstance(item, Mapping):
        raise BadSample("missing-key", "structured_rep holds something else than objects")
    size, colour = SIZES.get(require(item, "size", int)), COLOURS.get(require(item, "color", str).lower())
    if size is None or colour is None:
        raise BadSample("bad-label", f"an object of size {item['size']} and colour {item['color']!r}")
    return f"{size} {colour} {text(item, 'type')}"
