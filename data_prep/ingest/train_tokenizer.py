"""The tokenizer of a recipe: an existing one with the templates' special tokens, or one trained on the corpora."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.errors import UserError
from data_prep.common.files import hash_json, read_hashed, sha256_file, with_hash, write_atomic
from data_prep.example import Example, Reject
from data_prep.ingest.workspace import Workspace
from data_prep.progress import Reporter
from data_prep.text.tokenizer import Tokenizer, tokenizer_files, train_sentencepiece

if TYPE_CHECKING:
    from data_prep.corpora.base import Corpus

_REINGEST = "run `mma-prep ingest` with this recipe"
TRAINING_VERSION = 2
"""Incremented when the same texts would give a different tokenizer."""


def prepare_tokenizer(space: Workspace, reporter: Reporter) -> str:
    """Ensure that the output folder holds the recipe's tokenizer, training one if asked; return its sha256."""
    recipe, config = space.recipe, space.recipe.tokenizer
    source = recipe.tokenizer_path
    raw = _raw_texts(space) if source is None else _source_hashes(source)
    existed = has_tokenizer(space)
    inputs = hash_json([TRAINING_VERSION, config.model_dump(), recipe.specials(), raw])
    if _origin(space).get("inputs") == inputs:
        with suppress(UserError):  # a file is missing or damaged: rebuild the tokenizer
            return load_tokenizer(space).sha256
    if source is None:
        assert config.train is not None
        reporter.say(f"tokenizer: training SentencePiece on up to {config.train.samples:,} samples")
        source = space.tokenizer / "trained.model"
        texts = _training_texts(space.corpora, config.train.samples)
        train_sentencepiece(texts, config.train.vocab_size, recipe.specials(), source)
    model = recipe.vlm
    tokenizer = Tokenizer.open(source, recipe.specials(), *([model.image_token] if model else []))
    tokenizer.save(space.tokenizer)
    write_atomic(_marker(space), with_hash({"inputs": inputs, "sha256": tokenizer.sha256}))
    reporter.events(space.out).record("tokenizer-rebuilt", int(existed), path=space.tokenizer)
    reporter.say(f"tokenizer: {len(tokenizer):,} ids, sha256 {tokenizer.sha256[:12]}")
    return tokenizer.sha256


def load_tokenizer(space: Workspace) -> Tokenizer:
    """Return the tokenizer of the output folder. Raises UserError if it is missing, damaged or edited."""
    tokenizer = Tokenizer.load(space.tokenizer)
    if tokenizer.sha256 != _origin(space).get("sha256"):
        raise UserError(f"{space.tokenizer}: not the tokenizer that ingest wrote (damaged or edited); {_REINGEST}")
    return tokenizer


def has_tokenizer(space: Workspace) -> bool:
    """Return whether ingest has started: it builds the tokenizer first."""
    return _marker(space).is_file()


def _marker(space: Workspace) -> Path:
    return space.tokenizer / "origin.json"


def _origin(space: Workspace) -> dict[str, str]:
    """Return the inputs and the sha256 of the tokenizer; empty if they are missing or damaged."""
    found = read_hashed(_marker(space))
    return found if isinstance(found, dict) else {}


def _raw_texts(space: Workspace) -> dict[str, object]:
    """Return the inputs of a trained tokenizer: readers, their options and the raw files."""
    return {
        name: [space.recipe.corpora[name].model_dump(exclude={"augment"}), shards]
        for name, shards in space.shards.items()
    }


def _source_hashes(path: Path) -> dict[str, str]:
    """Return the inputs of an existing tokenizer: the files read from its folder, not the weights beside them."""
    return {file.name: sha256_file(file) for file in tokenizer_files(path)}


def _training_texts(corpora: Mapping[str, Corpus], samples: int) -> Iterator[str]:
    """Return the texts to train on. Raises UserError if there are none, with the reason of the first reject."""
    texts = corpus_texts(list(corpora.values()), samples)
    first = next(texts, None)
    if first is not None:
        return itertools.chain([first], texts)
    rejects = (
        f"corpora.{name}: {item.sample} is rejected for {item.code} ({item.detail})"
        for name, corpus in corpora.items()
        for shard in corpus.shards()
        for item in corpus.examples(shard)
        if isinstance(item, Reject)
    )
    why = next(rejects, "they hold no samples; fix their paths")
    raise UserError(f"tokenizer.train: the corpora hold no text to train on: {why}")


def corpus_texts(corpora: list[Corpus], samples: int) -> Iterator[str]:
    """Yield the texts of about ``samples`` samples, spread evenly over the corpora and their shards."""
    for corpus in corpora:
        shards = corpus.shards()
        quota = -(-samples // (len(corpora) * max(1, len(shards))))
        for shard in shards:
            kept = (item for item in corpus.examples(shard) if isinstance(item, Example))
            for example in itertools.islice(kept, quota):
                yield from (part for turn in example.turns for part in turn.parts if isinstance(part, str))
