"""Samples of a recognised corpus, read by the reader that will read all of it: shown, counted and measured."""

from __future__ import annotations

import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.corpora import build_corpus
from data_prep.example import Example, ImageRef, Reject
from data_prep.images.store import check_image
from data_prep.quarantine import BadSample
from data_prep.text.template import Template
from data_prep.text.tokenizer import Tokenizer, train_sentencepiece

SHOWN, LOOKED_AT = 3, 500
WIDTH = 100


@dataclass
class Looked:
    """The first samples of a corpus."""

    examples: list[Example] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    """By code."""
    first_reject: str = ""
    complete: bool = False
    """Whether these are all samples of the corpus."""

    @property
    def total(self) -> int:
        """Samples looked at."""
        return len(self.examples) + sum(self.rejects.values())

    @property
    def bad_fraction(self) -> float:
        """Share of them that is rejected."""
        return sum(self.rejects.values()) / self.total


def look_at_samples(kind: str, options: Mapping[str, Any], root: Path) -> Looked:
    """Read the first samples of a corpus, with their images. Raises UserError where every one is rejected."""
    found = Looked()
    for number, item in enumerate(_items(kind, options, root)):
        if number == LOOKED_AT:
            break
        problem = item if isinstance(item, Reject) else _image_problem(item)
        if problem is None:
            assert isinstance(item, Example)
            found.examples.append(item)
        else:
            found.rejects[problem.code] += 1
            found.first_reject = found.first_reject or f"{problem.sample}: {problem.code} ({problem.detail})"
    else:
        found.complete = True
    if not found.examples:
        many = sum(found.rejects.values())
        why = f"all of its first {many} samples are rejected, {found.first_reject}" if many else "it holds no sample"
        raise UserError(f"{kind}: {why}")
    return found


def _items(kind: str, options: Mapping[str, Any], root: Path) -> Iterator[Example | Reject]:
    corpus = build_corpus(kind, options, root)
    for shard in corpus.shards():
        yield from corpus.examples(shard)


def _image_problem(example: Example) -> Reject | None:
    for image in example.images:
        try:
            check_image(image.read())
        except BadSample as problem:
            return None if image.optional else Reject(example.id, problem.code, problem.detail)
        except OSError as problem:
            return None if image.optional else Reject(example.id, "missing-image", str(problem))
    return None


def show(example: Example) -> list[str]:
    """Return a sample in lines of the terminal."""
    lines = [f"  sample {_printable(example.id)}"]
    for turn in example.turns:
        said = " ".join(part if isinstance(part, str) else _image_line(part) for part in turn.parts)
        lines.append(f"    {turn.role + ':':10} {textwrap.shorten(_printable(said), WIDTH, placeholder=' ...')}")
    return lines


def _image_line(image: ImageRef) -> str:
    try:
        data = image.read()
        width, height = check_image(data)
    except (BadSample, OSError):
        return f"[image {image.name}, not readable]"
    return f"[image {image.name}, {width} x {height} px, {len(data):,} bytes]"


def _printable(text: str) -> str:
    """Replace what would move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def longest(
    examples: Sequence[Example], template: Template, tokenizer: Path | None, vocab_size: int, image_tokens: int
) -> tuple[int, list[str]]:
    """Return the tokens of the longest example, images and template included, and why others cannot be written.

    Without a tokenizer, one is trained on these examples. Raises UserError where no example can be written.
    """
    lengths, problems = list[int](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        source = tokenizer
        if source is None:
            source = Path(folder) / "tokenizer.model"
            texts = [part for one in examples for turn in one.turns for part in turn.parts if isinstance(part, str)]
            train_sentencepiece(texts, vocab_size, template.specials, source)
        encoder = Tokenizer.open(source, template.specials)
        for example in examples:
            try:
                lengths.append(len(encoder.encode(template.pieces(example), image_tokens)))
            except BadSample as problem:
                problems.append(f"{example.id}: {problem}")
    if not lengths:
        raise UserError(f"no sample can be written with the template {template.name}, {problems[0]}")
    return max(lengths), problems
