"""AKI's eleven instruction corpora with their published sizes and weights, as ingested shards without token ids.

Lengths are drawn: 144 image tokens, about 45 of system prompt and template, and texts as long as those of the corpora.
A plan reads nothing else of a shard, so ``mma-prep plan`` on such a folder does exactly what it does on real data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from data_prep.common.files import FileEntry, sha256_file, write_atomic
from data_prep.ingest.samples import SAMPLE_SCHEMA, SAMPLE_STATS
from data_prep.ingest.train_tokenizer import prepare_tokenizer
from data_prep.ingest.workspace import CorpusVariant, ShardOutput, ShardReport, Workspace
from data_prep.progress import Reporter
from data_prep.quarantine import Tally
from data_prep.recipe import Recipe, load_recipe
from data_prep.text.tokenizer import train_sentencepiece

Ints = npt.NDArray[np.int64]
IMAGE_TOKENS, FRAME_TOKENS, MOST_TEXT_TOKENS = 144, 45, 512


@dataclass(frozen=True, slots=True)
class Corpus:
    """One corpus: published number of samples, weight in the blend, and length statistics of its texts."""

    samples: int
    weight: float
    text_tokens: Callable[[np.random.Generator, int], npt.NDArray[np.floating | np.integer]]
    per_shard: int = 4096
    image_share: float = 1.0


def _words(mean: float) -> Callable[[np.random.Generator, int], npt.NDArray[np.int64]]:
    return lambda rng, count: rng.poisson(mean, count)


def _paragraphs(middle: float, spread: float) -> Callable[[np.random.Generator, int], npt.NDArray[np.float64]]:
    return lambda rng, count: rng.lognormal(np.log(middle), spread, count)


CORPORA = {
    "vqav2": Corpus(443_757, 0.103, _words(14)),
    "gqa": Corpus(943_000, 0.103, _words(15)),
    "vsr": Corpus(7_680, 0.026, _words(24)),
    "ocrvqa": Corpus(801_579, 0.103, _words(18), per_shard=20_000),
    "aokvqa": Corpus(17_056, 0.103, _words(50)),
    "scienceqa": Corpus(12_726, 0.103, _paragraphs(90, 0.6), image_share=0.49),
    "refcoco": Corpus(120_624, 0.103, _words(32)),
    "refcoco_plus": Corpus(120_191, 0.103, _words(32)),
    "refcocog": Corpus(80_512, 0.103, _words(37)),
    "visual_genome": Corpus(5_408_689, 0.047, _words(34), per_shard=25_000),
    "llava": Corpus(157_712, 0.103, _paragraphs(230, 0.5)),
}


def make_workspace(folder: Path, seq_len: int, draws: int, scale: float = 1.0) -> Recipe:
    """Write shards of all corpora under ``folder``; return a recipe whose ingest is complete.

    Args:
        folder: empty, or made by the same call.
        seq_len: tokens of a packed row.
        draws: of the whole blend.
        scale: of the corpora; 1 for the published sizes.
    """
    recipe = load_recipe(str(_write_recipe(folder, seq_len, draws, scale)))
    space = Workspace(recipe)
    tokenizer = prepare_tokenizer(space, Reporter(quiet=True))
    for variant in space.variants(tokenizer):
        _write_shards(variant, CORPORA[variant.corpus], scale)
    return recipe


def _write_recipe(folder: Path, seq_len: int, draws: int, scale: float) -> Path:
    model = folder / "raw" / "tokenizer" / "tokenizer.model"
    if not model.is_file():
        model.parent.mkdir(parents=True, exist_ok=True)
        train_sentencepiece(["a few words are enough, for nothing is tokenised here"], 300, (), model)
    for name, corpus in CORPORA.items():
        for number in range(-(-int(corpus.samples * scale) // corpus.per_shard)):
            shard = folder / "raw" / name / f"{number:05d}.tar"  # a shard's name; nothing is read from it
            shard.parent.mkdir(parents=True, exist_ok=True)
            shard.touch()
    content = {
        "root": str(folder / "raw"),
        "out": str(folder / "out"),
        "tokenizer": "tokenizer",
        "image_tokens": IMAGE_TOKENS,
        "corpora": {name: {"type": "webdataset", "tars": f"{name}/*.tar"} for name in CORPORA},
        "packs": {
            "sft": {
                "corpora": {name: corpus.weight for name, corpus in CORPORA.items()},
                "template": "plain",
                "seq_len": seq_len,
                "draws": draws,
            }
        },
    }
    path = folder / f"recipe-{seq_len}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _write_shards(variant: CorpusVariant, corpus: Corpus, scale: float) -> None:
    left = int(corpus.samples * scale)
    for output in variant.outputs:
        count = min(corpus.per_shard, left)
        left -= count
        if not output.done():
            _write_shard(output, corpus, count)


def _write_shard(output: ShardOutput, corpus: Corpus, count: int) -> None:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{output.corpus}/{output.shard}".encode()).digest()[:8]))
    output.folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(output.tokens), "wb") as sink:
        pa.ipc.new_file(sink, SAMPLE_SCHEMA).close()  # a plan reads no more of it than its size
    output.stats.write_bytes(_facts(corpus, count, rng).tobytes())
    for path in (output.rejects, output.image_hashes, output.sources):
        path.write_bytes(b"")
    hashes = map(sha256_file, (output.tokens, output.stats, output.image_hashes, output.rejects, output.sources))
    report = ShardReport(output.raw, Tally(count), FileEntry("", 0, ""), output.tokens.stat().st_size, *hashes)
    write_atomic(output.marker, report.to_json().encode())


def _facts(corpus: Corpus, count: int, rng: np.random.Generator) -> npt.NDArray[np.void]:
    stats = np.zeros(count, dtype=SAMPLE_STATS)
    text = np.clip(corpus.text_tokens(rng, count), 4, MOST_TEXT_TOKENS - FRAME_TOKENS).astype(np.int32)
    stats["images"] = rng.random(count) < corpus.image_share
    stats["tokens"] = FRAME_TOKENS + text + IMAGE_TOKENS * stats["images"]
    stats["targets"] = text // 2
    stats["ended"] = True
    return stats
