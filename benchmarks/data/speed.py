"""``speed``: ingest of captioned images and of conversations, and reading, beside the bare operations, on one core."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
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

from data_prep.common.workers import ALONE
from data_prep.corpora import build_corpus
from data_prep.example import Example
from data_prep.images.store import decode_rgb
from data_prep.ingest.image_store_build import build_image_store
from data_prep.ingest.shard_writer import ShardJob, ingest_shard
from data_prep.ingest.train_tokenizer import prepare_tokenizer
from data_prep.ingest.workspace import CorpusVariant, ShardReport, Workspace
from data_prep.packs import PackReader
from data_prep.progress import Reporter
from data_prep.recipe import Recipe, load_recipe
from data_prep.text.encoding import Encoded
from data_prep.text.tokenizer import Tokenizer

QUIET = Reporter(quiet=True)
_Bare = Callable[[Path, Path], tuple[list[str], dict[str, float]]]
WORDS = ("red", "green", "ball", "cube", "ring", "dog", "cat", "table", "street", "under", "beside", "of", "and", "two")
TURNS = 4
READ, HASH, DECODE = "read the tar", "hash the images", "decode the images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=1500, help="samples per corpus (default: %(default)s)")
    parser.add_argument("--words", type=int, default=60, help="words per caption and per turn (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=384, help="side of a drawn image (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="tar of JPEGs to use instead of drawn images")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: SentencePiece trained on the texts)")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables, line by line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _write_corpora(folder, options)
        for corpus, bare in (("captions", _bare_captions), ("talk", _bare_talk)):
            yield f"| {corpus} | processor s | per second | share of ingest |"
            yield "|---|---:|---:|---:|"
            yield from _ingest_table(recipe, corpus, bare)
            yield ""
        yield "| reader | rows / s |"
        yield "|---|---:|"
        yield from _reader_table(recipe, folder)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _ingest_table(recipe: Recipe, corpus: str, bare: _Bare) -> Iterator[str]:
    """Ingestion of one shard, and the minimum operations for the same file."""
    space = Workspace(recipe)
    jobs = {
        variant.corpus: ShardJob(variant.outputs[0], variant)
        for variant in space.variants(prepare_tokenizer(space, QUIET))
    }
    ingest_shard(jobs[f"{corpus}_warm"])  # loads the libraries; its texts are others, so none is remembered
    samples, whole = _ingest(jobs[corpus], recipe.root_dir / "sealed" / corpus)
    tokenizer = Tokenizer.load(space.tokenizer)
    tokenized, spent = _tokenize(jobs[corpus].variant)
    texts, seconds = bare(recipe.root_dir, recipe.root_dir / "copy")
    encoded = _seconds(lambda: [tokenizer._backend.encode(text) for text in texts])
    tokens = sum(len(tokenizer._backend.encode(text)) for text in texts)
    yield f"| ingest, {samples:,} samples | {whole:.2f} | {samples / whole:,.0f} samples | 100 % |"
    yield f"| its {tokens:,} text tokens | {whole:.2f} | **{tokens / whole / 1e6:.2f} M tokens** | |"
    rate = f"**{tokenized / spent / 1e6:.2f} M tokens**"
    yield f"| tokenize, with sidecars | {spent:.2f} | {rate} | {spent / whole:.0%} |"
    yield f"| encode the texts | {encoded:.2f} | {tokens / encoded / 1e6:.2f} M tokens | {encoded / whole:.0%} |"
    for name, took in seconds.items():
        yield f"| {name} | {took:.2f} | {samples / max(took, 1e-9):,.0f} samples | {took / whole:.0%} |"
    floor = encoded + sum(seconds.values())
    yield f"| all of these | {floor:.2f} | {samples / floor:,.0f} samples | **{floor / whole:.0%}** |"
    if corpus == "captions":
        opened = sum(seconds[name] for name in (READ, HASH, DECODE))
        yield f"| read, hash and decode | {opened:.2f} | {samples / opened:,.0f} samples | **{opened / whole:.0%}** |"


def _ingest(job: ShardJob, stores: Path) -> tuple[int, float]:
    """Return the samples of a shard, and the seconds to ingest it and to build its image store."""
    reports = list[ShardReport]()
    seconds = _seconds(lambda: reports.append(ingest_shard(job)))
    return reports[0].tally.kept, seconds + _seconds(lambda: build_image_store([job.output], stores, ALONE))


def _tokenize(variant: CorpusVariant) -> tuple[int, float]:
    """Return the text tokens of a corpus as the project tokenises it, templates and sidecars included, and seconds."""
    corpus = build_corpus(variant.kind, variant.options, variant.root)
    examples = (item for item in corpus.examples(variant.outputs[0].shard) if isinstance(item, Example))
    samples = [variant.encoding.template.pieces(example) for example in examples]
    tokenizer, encoded = Tokenizer.load(variant.tokenizer), list[Encoded]()
    seconds = _seconds(lambda: encoded.extend(tokenizer.encode(pieces, 1) for pieces in samples))
    return sum(len(sample) - int(sample.modality.sum()) for sample in encoded), seconds


def _bare_captions(raw: Path, copy: Path) -> tuple[list[str], dict[str, float]]:
    """Return the captions, and what it takes to read, hash, decode whole and write what the tar holds."""
    tar = raw / "captions.tar"
    members = list(_read_tar(tar))
    images = [data for name, data in members if name.endswith(".jpg")]
    return [data.decode() for name, data in members if name.endswith(".txt")], {
        READ: _seconds(lambda: list(_read_tar(tar))),
        HASH: _seconds(lambda: [hashlib.sha256(data).digest() for data in images]),
        DECODE: _seconds(lambda: [decode_rgb(data) for data in images]),
        "write and sync": _seconds(lambda: _write(copy, images)),
    }


def _bare_talk(raw: Path, copy: Path) -> tuple[list[str], dict[str, float]]:
    """Return the texts of the conversations, and what it takes to parse their lines and write as much."""
    lines = (raw / "talk.jsonl").read_bytes().splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    return texts, {
        "parse the lines": _seconds(lambda: [json.loads(line) for line in lines]),
        "write and sync": _seconds(lambda: _write(copy, lines)),
    }


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar:
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

    from data_prep.ingest.step import ingest
    from data_prep.materialize import materialize
    from data_prep.planning.step import plan

    ingest(recipe, ALONE, QUIET)
    plan(recipe, QUIET)
    materialize(recipe, ALONE, QUIET)
    reader = PackReader(Workspace(recipe).packs("all"))
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


def _write_corpora(folder: Path, options: argparse.Namespace) -> Recipe:
    """Captioned noisy JPEG images in a tar, conversations in JSON lines, each with a small one to warm up."""
    raw = folder / "raw"
    raw.mkdir()
    for seed, (suffix, samples) in enumerate((("", options.samples), ("_warm", 50))):
        _write_captions(raw / f"captions{suffix}.tar", samples, options, seed)
        _write_talk(raw / f"talk{suffix}.jsonl", samples, options.words, seed)
    own = {"train": {"vocab_size": 400, "samples": 2000}}
    names = ("captions", "captions_warm", "talk", "talk_warm")
    content = {
        "root": str(raw),
        "out": str(folder / "out"),
        "tokenizer": str(options.tokenizer.resolve()) if options.tokenizer else own,
        "image_tokens": 144,
        "corpora": {
            name: {"type": "webdataset", "tars": f"{name}.tar"}
            if name.startswith("captions")
            else {"type": "chat", "data": f"{name}.jsonl"}
            for name in names
        },
        "packs": {"all": {"corpora": list(names), "template": "phi3", "seq_len": 2048, "epochs": 1}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(str(path))


def _write_captions(path: Path, samples: int, options: argparse.Namespace, seed: int) -> None:
    rng = random.Random(seed)
    images = _photos(options.photos) if options.photos else _drawings(options.pixels, seed)
    with tarfile.open(path, "w") as tar:
        for key, image in zip(range(samples), images, strict=False):
            text = " ".join(rng.choices(WORDS, k=options.words)) + f" {key}"
            number = f"{seed} {key:08d}".encode()  # as a comment, so that no two images are the same
            comment = b"\xff\xfe" + (2 + len(number)).to_bytes(2) + number
            for suffix, data in (("jpg", image[:2] + comment + image[2:]), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{key:08d}.{suffix}")
                info.size, info.mtime = len(data), 0.5  # a fraction, as img2dataset's writer leaves it
                tar.addfile(info, io.BytesIO(data))


def _drawings(side: int, seed: int) -> Iterator[bytes]:
    pixels = np.random.default_rng(seed)
    while True:
        small, out = pixels.integers(0, 256, (12, 12, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(small).resize((side, side)).save(out, "JPEG", quality=90)
        yield out.getvalue()


def _photos(tar: Path) -> Iterator[bytes]:
    """Return the JPEGs of a tar, again and again."""
    return itertools.cycle([data for name, data in _read_tar(tar) if data.startswith(b"\xff\xd8")])


def _write_talk(path: Path, samples: int, words: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w") as out:
        for key in range(samples):
            said = [" ".join(rng.choices(WORDS, k=words)) + f" {key}" for _ in range(TURNS)]
            roles = ("user", "assistant") * (TURNS // 2)
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            out.write(json.dumps({"messages": messages}) + "\n")
