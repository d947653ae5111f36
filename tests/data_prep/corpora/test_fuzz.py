"""No broken raw row stops a reader: mutated fixtures become examples or rejects, never an exception."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.corpora import build_corpus
from data_prep.example import Example, Reject
from data_prep.quarantine import CODES

FIXTURES = Path(__file__).parents[2] / "fixtures"
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**400,
    "", " ", "x" * 5000, "\ud800", "\0", "../a", "/a", "<image>",
    [], [None], ["a", 1], [[[]]], [{}], {}, {"a": 1}, {"bytes": 1}, [[1, 2, 3, 4]], ["", ""],
)  # fmt: skip
JSON_CORPORA = [
    pytest.param("vqav2", {}, "v2_OpenEnded_mscoco_train2014_questions.json", id="vqav2-questions"),
    pytest.param("vqav2", {}, "v2_mscoco_train2014_annotations.json", id="vqav2-annotations"),
    pytest.param("refcoco", {"direction": "both"}, "finetune_refcoco_train.json", id="refcoco"),
    pytest.param("llava", {}, "llava_instruct_150k.json", id="llava"),
    pytest.param("gqa", {}, "train_balanced_questions.json", id="gqa"),
    pytest.param("ocrvqa", {}, "dataset.json", id="ocrvqa"),
    pytest.param("aokvqa", {}, "aokvqa_v1p0_train.json", id="aokvqa"),
    pytest.param("scienceqa", {}, "problems.json", id="scienceqa"),
    pytest.param("visual_genome", {}, "region_descriptions.json", id="visual-genome-regions"),
    pytest.param("visual_genome", {}, "image_data.json", id="visual-genome-images"),
    pytest.param("nlvr", {"task": "caption"}, "dev/dev.json", id="nlvr-caption"),
    pytest.param("nlvr", {"task": "verify"}, "dev/dev.json", id="nlvr-verify"),
    pytest.param("vsr", {}, "train.jsonl", id="vsr"),
    pytest.param("chat", {"data": "part-0.jsonl", "images_column": "images"}, "part-0.jsonl", id="chat"),
    pytest.param("chat", {"data": "part-1.jsonl"}, "part-1.jsonl", id="chat-found-columns"),
    pytest.param("interleaved", {"data": "obelics/*.jsonl"}, "obelics/part.jsonl", id="obelics"),
    pytest.param(
        "interleaved",
        {"data": "mmc4/*.jsonl", "format": "mmc4"},
        "mmc4/docs_no_face_shard_0_v2.jsonl",
        id="mmc4",
    ),
    pytest.param(
        "captions",
        {"data": "own.jsonl", "images": ".", "names": "path", "image_key": "file"},
        "own.jsonl",
        id="captions",
    ),
]


def inner_places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside the rows; the lists and objects of rows stay intact."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    here = [(value, key) for key, inner in entries if depth > 0 and not (depth == 1 and isinstance(value, list))]
    return here + [place for _, inner in entries for place in inner_places(inner, depth + 1)]


def mutate(content: Any, rng: random.Random) -> None:
    """Replace or drop a few values somewhere inside the rows."""
    for _ in range(rng.randint(1, 4)):
        places = inner_places(content)
        container, key = rng.choice(places)
        if isinstance(container, dict) and rng.random() < 0.3:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def mutated(text: str, lines: bool, rng: random.Random) -> str:
    if not lines:
        content = json.loads(text)
        mutate(content, rng)
        return json.dumps(content)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    mutate(rows, rng)
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(("kind", "options", "file"), JSON_CORPORA)
def test_mutated_rows_become_examples_or_rejects(
    kind: str, options: Mapping[str, Any], file: str, tmp_path: Path
) -> None:
    root = tmp_path / kind
    shutil.copytree(FIXTURES / kind, root)
    original = (root / file).read_text(encoding="utf-8", errors="replace")
    for seed in range(150):
        (root / file).write_text(mutated(original, (kind == "nlvr" or file.endswith(".jsonl")), random.Random(seed)))
        corpus = build_corpus(kind, options, root)
        for item in (item for shard in corpus.shards() for item in corpus.examples(shard)):
            if isinstance(item, Reject):
                assert item.code in CODES, seed
                f"{item.sample}{item.detail}".encode()  # the list of rejects must be able to hold it
            else:
                assert isinstance(item, Example), seed
                assert item.turns[-1].role == "assistant", seed
                for part in (part for turn in item.turns for part in turn.parts if isinstance(part, str)):
                    assert part.strip(), seed
                    part.encode()


def test_a_damaged_tar_is_named_or_loses_samples_but_never_crashes(tmp_path: Path) -> None:
    whole = (FIXTURES / "webdataset/cc12m/00000.tar").read_bytes()
    outcomes = set()
    for seed in range(300):
        rng, damaged = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "00000.tar").write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        corpus = build_corpus("webdataset", {}, tmp_path)
        items = [item for shard in corpus.shards() for item in corpus.examples(shard)]
        assert all(isinstance(item, Example | Reject) for item in items)
        outcomes.add(any(isinstance(item, Reject) and item.code == "damaged-tar" for item in items))
    assert outcomes == {True, False}
