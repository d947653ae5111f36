"""``speed``: ingest and reading, each beside the bare operations it cannot do without, on one core."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from data_prep.images import decode_rgb
from data_prep.packs import PackReader
from data_prep.progress import Reporter
from data_prep.recipe import Recipe, load_recipe
from data_prep.recipe_tokenizer import prepare_tokenizer
from data_prep.template import Text
from data_prep.tokenizer import Tokenizer
from data_prep.units import UnitJob, ingest_unit
from data_prep.workers import ALONE
from data_prep.workspace import Workspace

WORDS = ("red", "green", "ball", "cube", "ring", "dog", "cat", "table", "street", "under", "beside", "of", "and", "two")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--words", type=int, default=60, help="of a caption")
    parser.add_argument("--pixels", type=int, default=384, help="side of an image")
    parser.add_argument("--tokenizer", type=Path, help="a folder (default: SentencePiece, trained on the captions)")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables, line by line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _write_corpus(folder, options)
        yield "| work | processor s | per second | share of ingest |"
        yield "|---|---:|---:|---:|"
        yield from _ingest_table(recipe, folder, options)
        yield ""
        yield "| reader | rows / s |"
        yield "|---|---:|"
        yield from _reader_table(recipe, folder)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _ingest_table(recipe: Recipe, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Ingest of one unit, and what a program must do at least for the same tar: read, hash, decode, encode, write."""
    space = Workspace(recipe)
    (intake,) = space.intakes(prepare_tokenizer(space, Reporter(quiet=True)))
    job = UnitJob(intake.units[0], intake)
    ingest_unit(job)  # loads the libraries
    whole = _seconds(lambda: ingest_unit(job))
    tar = folder / "raw" / "00000.tar"
    members = list(_read_tar(tar))
    images = [data for name, data in members if name.endswith(".jpg")]
    texts = [data.decode() for name, data in members if name.endswith(".txt")]
    tokenizer = Tokenizer.load(space.tokenizer)
    tokens = sum(len(tokenizer.encode([Text(text)], 1).ids) for text in texts)
    tokenizer = Tokenizer.load(space.tokenizer)  # with nothing remembered
    bare = {
        "read the tar": _seconds(lambda: list(_read_tar(tar))),
        "hash the images": _seconds(lambda: [hashlib.sha256(data).digest() for data in images]),
        "decode the images": _seconds(lambda: [decode_rgb(data) for data in images]),
        "encode the texts": _seconds(lambda: [tokenizer._backend.encode(text) for text in texts]),
        "write and sync": _seconds(lambda: _write(folder / "copy", images)),
    }
    rates = {"encode the texts": f"{tokens / bare['encode the texts'] / 1e6:.2f} M tokens"}
    what = f"ingest of {len(texts):,} captions, {tokens:,} tokens"
    rate = f"{len(texts) / whole:,.0f} samples, {tokens / whole / 1e6:.2f} M tokens"
    yield f"| {what} | {whole:.2f} | {rate} | 100 % |"
    for name, seconds in bare.items():
        rate = rates.get(name, f"{len(texts) / max(seconds, 1e-9):,.0f} samples")
        yield f"| {name} | {seconds:.2f} | {rate} | {seconds / whole:.0%} |"
    floor = sum(bare.values())
    yield f"| all of these | {floor:.2f} | {len(texts) / floor:,.0f} samples | **{floor / whole:.0%}** |"


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r|") as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            yield info.name, file.read()


def _write(path: Path, parts: list[bytes]) -> None:
    with path.open("wb") as stream:
        stream.writelines(parts)
        stream.flush()
        os.fsync(stream.fileno())


def _reader_table(recipe: Recipe, folder: Path) -> Iterator[str]:
    """Rows in random order from packs, and the same rows saved by ``datasets``."""
    from datasets import Dataset

    from data_prep.ingest import ingest
    from data_prep.materialize import materialize
    from data_prep.plan import plan

    quiet = Reporter(quiet=True)
    ingest(recipe, ALONE, quiet)
    plan(recipe, quiet)
    materialize(recipe, ALONE, quiet)
    reader = PackReader(Workspace(recipe).packs("pt"))
    columns = ("input_ids", "modality", "segment", "instance", "generated", "image_row")
    rows = [{name: getattr(row, name) for name in columns} | {"n_target": row.n_target} for row in reader]
    Dataset.from_list(rows).save_to_disk(str(folder / "hf"))
    saved = Dataset.load_from_disk(str(folder / "hf")).with_format("numpy")
    order = np.random.default_rng(0).integers(len(reader), size=2000).tolist()
    same = all((reader[row].input_ids == saved[row]["input_ids"]).all() for row in order[:20])
    assert same, "the two hold different rows"
    for name, source in (("this project", reader), ("datasets, numpy format", saved)):
        seconds = _seconds(lambda source=source: [source[row] for row in order])  # type: ignore[misc]
        yield f"| {name} | {len(order) / seconds:,.0f} |"


def _write_corpus(folder: Path, options: argparse.Namespace) -> Recipe:
    """One tar of noisy JPEG images with captions of made-up words, and a recipe for it."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    raw, loose = folder / "raw", folder / "loose"
    raw.mkdir()
    loose.mkdir()
    with tarfile.open(raw / "00000.tar", "w") as tar:
        for key in range(options.samples):
            small = pixels.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(small).resize((options.pixels, options.pixels)).save(loose / "image.jpg", quality=90)
            (loose / "text.txt").write_text(" ".join(rng.choices(WORDS, k=options.words)) + f" {key}")
            tar.add(loose / "image.jpg", f"{key:08d}.jpg")
            tar.add(loose / "text.txt", f"{key:08d}.txt")
    content = {
        "root": str(raw),
        "out": str(folder / "out"),
        "tokenizer": str(options.tokenizer.resolve())
        if options.tokenizer
        else {"train": {"vocab_size": 400, "samples": 2000}},
        "image_tokens": 144,
        "corpora": {"captions": {"type": "webdataset", "tars": "*.tar"}},
        "packs": {"pt": {"corpora": ["captions"], "template": "caption", "length": 2048, "epochs": 1}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(str(path))
