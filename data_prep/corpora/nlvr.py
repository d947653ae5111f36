"""Cornell NLVR: sentences about three boxes of coloured shapes, as captions or true-or-false questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import Field, model_validator

from data_prep.common.errors import UserError
from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus
from data_prep.corpora.fields import fill, placeholder, question_example, require, require_id, require_text
from data_prep.corpora.json_files import json_rows
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample

COLOURS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
SIZES = {10: "small", 20: "medium", 30: "big"}


class NLVR(RowCorpus):
    """Lines ``{sentence, label, identifier, directory, structured_rep}``; images ``SPLIT-IDENTIFIER-k.png``.

    Every example comes with six pictures that differ only in the order of the boxes. A *presentation* (the first number
    of the identifier) is one sentence with up to four scenes. To hold out data, use ``hold_out``. ``groups`` are the
    numbered image folders; in dev and train they keep presentations together, in the hidden split they do not.
    """

    sentences: RawFile = Path("dev/dev.json")
    """JSON-lines file of one split."""
    images: RawFolder = Path("dev/images")
    """Folder that holds the numbered image folders."""
    task: Literal["verify", "caption"] = "verify"
    """``verify``: is the sentence true of the picture? ``caption``: describe the picture, from its structured_rep."""
    hold_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Approximate share of the presentations that are kept for evaluation, such as 0.15. Presentations that share a
    sentence or a scene are on the same side."""
    part: Literal["train", "held_out"] = "train"
    """With ``hold_out``: which side this corpus is. Both need the same ``hold_out`` and ``split_with``."""
    split_with: tuple[Path, ...] = ()
    """Sentence files of the other corpora of the recipe: presentations that share a sentence or a scene with them are
    split together. Without it, dev and hidden would leak into each other."""
    groups: tuple[str, ...] | None = None
    """Image folders to use, for example ``["0"]``; default: all. Images of other folders need not exist."""
    exclude_groups: tuple[str, ...] = ()
    """Image folders to leave out; their images need not exist."""
    permutations: Annotated[int, Field(ge=1, le=6)] = 1
    """How many of the six pictures to use; a sentence with a missing picture is rejected."""
    prompt: Annotated[str, placeholder("sentence")] = "{sentence} True or false?"
    """User turn of ``task: verify``. ``{sentence}`` becomes the sentence."""
    answers: tuple[str, str] = ("true", "false")
    """Answers for a true and for a false sentence."""

    @model_validator(mode="after")
    def _part_of_something(self) -> NLVR:
        if self.part == "held_out" and self.hold_out is None:
            raise ValueError("part: held_out needs hold_out, the share of the presentations to keep for evaluation")
        return self

    @property
    def never_augment(self) -> str:
        """Why ``augment`` is refused."""
        return "its sentences are about positions and counts"

    def read_rows(self) -> Sequence[object]:
        """Index the lines."""
        return json_rows(self.root / self.sentences)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        """File name of an image -> its path."""
        return {path.name: path for path in sorted((self.root / self.images).glob("*/*.png")) if not path.is_symlink()}

    @cached_property
    def _held_out(self) -> frozenset[str]:
        """Presentations on the held-out side."""
        files = dict.fromkeys((self.sentences, *self.split_with))
        rows = ((file.stem, row) for file in sorted(files) for row in json_rows(self.root / file))
        return held_out(rows, self.sentences.stem, self.hold_out or 0)

    def _uses(self, group: str) -> bool:
        return group not in self.exclude_groups and (self.groups is None or group in self.groups)

    def files(self) -> Sequence[Path]:
        """Return the sentence files. Raises UserError when one of ``split_with`` does not exist."""
        others = [self.root / file for file in self.split_with]
        for path in others:
            if not path.is_file():
                raise UserError(f"nlvr.split_with: file {path} does not exist; set 'split_with' or the recipe's root")
        return [*super().files(), *others]

    def row_id(self, row: Row) -> str:
        """Return the identifier ``n-m``."""
        return require_id(row, "identifier")

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return one example per picture used; none when the row is in another part or group."""
        if self.hold_out and (_presentation(sample) in self._held_out) != (self.part == "held_out"):
            return
        for permutation in range(self.permutations):
            name = f"{self.sentences.stem}-{sample}-{permutation}.png"
            path = self._by_name.get(name)
            if not self._is_used(row, path):
                return
            if path is None:
                raise BadSample("missing-image", f"{name} is in no folder of {self.images}")
            yield self._example(row, f"{sample}-{permutation}", ImageRef(name, path=path))

    def _is_used(self, row: Row, path: Path | None) -> bool:
        """Return whether the image folder of a row is used; a hidden row without its image is in no wanted folder."""
        if path is not None:
            return self._uses(path.parent.name)
        directory = row.get("directory")
        return self.groups is None if directory is None else self._uses(str(directory))

    def _example(self, row: Row, sample: str, image: ImageRef) -> Example:
        if self.task == "caption":
            caption = describe_boxes(require(row, "structured_rep", list))
            return Example(sample, (Turn("user", (image,)), Turn("assistant", (caption,))), kind="document")
        sentence, label = require_text(row, "sentence"), require_text(row, "label")
        if label not in ("true", "false"):
            raise BadSample("bad-label", f"label is {label!r}, expected true or false")
        answer = self.answers[0 if label == "true" else 1]
        return question_example(sample, [image], fill(self.prompt, sentence=sentence), answer, family="nlvr")


def held_out(rows: Iterable[tuple[str, object]], split: str, fraction: float) -> frozenset[str]:
    """Return the presentations of a split that are held out.

    Presentations that share a sentence or a scene, directly or through others, form a cluster; a hash of the cluster
    decides its side. So the sides do not depend on the order of rows or files.

    Args:
        rows: ``(split, row)`` of all files that are split together.
        split: the split whose presentations are asked for.
        fraction: approximate share of the presentations to hold out.
    """
    clusters = _Clusters()
    for name, row in rows:
        if isinstance(row, Mapping) and isinstance(row.get("identifier"), str | int):
            place = f"{name}/{_presentation(str(row['identifier']))}"
            for content in _contents(row):
                clusters.join(place, content)
    limit = int(fraction * 2**64)
    chosen = (place for place in clusters.names if clusters.hash_of(place) < limit)
    return frozenset(place.removeprefix(f"{split}/") for place in chosen if place.startswith(f"{split}/"))


def _presentation(identifier: str) -> str:
    return identifier.partition("-")[0]


def _contents(row: Mapping[str, object]) -> Iterator[str]:
    """Yield what two presentations must not share across a split: the sentence, and the scene in any order of boxes."""
    sentence, boxes = row.get("sentence"), row.get("structured_rep")
    if isinstance(sentence, str):
        yield "sentence " + " ".join(sentence.lower().rstrip(". ").split())
    if isinstance(boxes, list):
        scene = [sorted(json.dumps(item, sort_keys=True) for item in box) for box in boxes if isinstance(box, list)]
        yield "scene " + json.dumps(sorted(scene))


class _Clusters:
    """Names that were joined, directly or through others (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    @property
    def names(self) -> Iterable[str]:
        """All names that were joined to another."""
        return self._parents

    def join(self, one: str, other: str) -> None:
        """Put two names into one cluster, led by its smallest name."""
        first, second = sorted((self._leader(one), self._leader(other)))
        self._parents[second] = first

    def hash_of(self, name: str) -> int:
        """Return a 64-bit hash that all names of a cluster share."""
        return xxhash.xxh3_64_intdigest(self._leader(name).encode(errors="surrogatepass"))

    def _leader(self, name: str) -> str:
        while (parent := self._parents.setdefault(name, name)) != name:
            self._parents[name] = self._parents[parent]
            name = parent
        return name


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
