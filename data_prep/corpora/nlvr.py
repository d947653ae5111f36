"""Cornell NLVR: sentences about three boxes of coloured shapes, as captions or true-or-false questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import placeholder, question_example, require, require_id, require_text
from data_prep.corpora.tables import json_lines
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample

COLOURS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
SIZES = {10: "small", 20: "medium", 30: "big"}


class NLVR(RowCorpus):
    """Lines ``{sentence, label, identifier, directory, structured_rep}``; images ``SPLIT-IDENTIFIER-k.png``.

    Every example comes with six pictures that differ only in the order of the boxes. ``groups`` are the numbered image
    folders: the corpus's own cross-validation splits, which keep all pictures of one presentation together. The hidden
    split names no folder, so images are found by name.
    """

    sentences: RawFile = Path("dev/dev.json")
    """JSON-lines file of one split."""
    images: RawFolder = Path("dev/images")
    """Folder that holds the numbered image folders."""
    task: Literal["verify", "caption"] = "verify"
    """``verify``: is the sentence true of the picture? ``caption``: describe the picture, from its structured_rep."""
    groups: tuple[str, ...] | None = None
    """Image folders to use, for example ``["0"]``; default: all."""
    exclude_groups: tuple[str, ...] = ()
    """Image folders to leave out."""
    permutations: Annotated[int, Field(ge=1, le=6)] = 1
    """How many of the six pictures to use; a sentence with a missing picture is rejected."""
    prompt: Annotated[str, placeholder("sentence")] = "{sentence} True or false?"
    """User turn of ``task: verify``. ``{sentence}`` becomes the sentence."""
    answers: tuple[str, str] = ("true", "false")
    """Answers for a true and for a false sentence."""

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its sentences are about positions and counts"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_lines(self.root / self.sentences)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        """File name of an image -> its path."""
        return {path.name: path for path in sorted((self.root / self.images).glob("*/*.png")) if not path.is_symlink()}

    def row_id(self, row: Row) -> str:
        """Return the identifier ``n-m``."""
        return require_id(row, "identifier")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return one example for each picture used; none when the pictures are in another group."""
        for permutation in range(self.permutations):
            name = f"{self.sentences.stem}-{sample}-{permutation}.png"
            if name not in self._by_name:
                raise BadSample("missing-image", f"{name} is in no folder of {self.images}")
            path = self._by_name[name]
            group = path.parent.name
            if group not in self.exclude_groups and (self.groups is None or group in self.groups):
                yield self._example(row, f"{sample}-{permutation}", ImageRef(name, path=path))

    def _example(self, row: Row, sample: str, image: ImageRef) -> Example:
        if self.task == "caption":
            caption = describe_boxes(require(row, "structured_rep", list))
            return Example(sample, (Turn("user", (image,)), Turn("assistant", (caption,))), kind="document")
        sentence, label = require_text(row, "sentence"), require_text(row, "label")
        if label not in ("true", "false"):
            raise BadSample("bad-label", f"label is {label!r}, expected true or false")
        answer = self.answers[0 if label == "true" else 1]
        return question_example(sample, [image], self.prompt.replace("{sentence}", sentence), answer, family="nlvr")


def describe_boxes(boxes: Sequence[object]) -> str:
    """Return ``a box with 1 small blue circle and 2 big yellow squares, an empty box, ...``."""
    if not boxes or not all(isinstance(box, list) for box in boxes):
        raise BadSample("missing-key", "structured_rep is not a list of boxes")
    return ", ".join(_describe_box(box) for box in boxes if isinstance(box, list))


def _describe_box(objects: Sequence[object]) -> str:
    counts = Counter(_name(item) for item in objects)
    held = [f"{number} {name}{'s' * (number > 1)}" for name, number in sorted(counts.items())]
    return f"a box with {' and '.join(held)}" if held else "an empty box"


def _name(item: object) -> str:
    if not isinstance(item, Mapping):
        raise BadSample("missing-key", f"structured_rep contains {type(item).__name__}, expected objects")
    size, colour = SIZES.get(require(item, "size", int)), COLOURS.get(require(item, "color", str).lower())
    if size is None or colour is None:
        raise BadSample("bad-label", f"an object has unknown size {item['size']} or colour {item['color']!r}")
    return f"{size} {colour} {require_text(item, 'type')}"
