"""What a conversation becomes under each setting of ``turns``: token for token, and in packs."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_prep.example import Example, ImageRef, Turn
from data_prep.packs import PackReader
from data_prep.show.stats import show_stats
from data_prep.text.encoding import Encoded
from data_prep.text.template import Template
from data_prep.text.tokenizer import Tokenizer
from data_prep.text.turns import Turns, excerpts
from tests.data_prep.raw import make_recipe, prepare, recipe_dict, tree_hashes, write_llava
from tests.data_prep.text.test_tokenizer import KINDS, SPECIALS

PICTURE = ImageRef("p", data=b"")
IMAGE_TOKENS = 4
TALKS = 12
words = st.text("a ring?\n<>|Ω", min_size=1, max_size=8)
asked = st.builds(lambda text, images: Turn("user", (*[PICTURE] * images, text)), words, st.integers(0, 2))
exchange = st.tuples(asked, words.map(lambda text: Turn("assistant", (text,))))
conversations = st.lists(exchange, min_size=1, max_size=4).map(
    lambda pairs: Example("c", tuple(turn for pair in pairs for turn in pair))
)


def encoded(tokenizer: Tokenizer, template: Template, example: Example) -> list[Encoded]:
    return [
        tokenizer.encode(template.pieces(excerpt.example), IMAGE_TOKENS)
        for excerpt in excerpts(example, template.turns)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "phi3"])
def test_expanding_supervises_the_same_tokens_and_repeats_a_prefix_of_the_same_ids(
    kind: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = Tokenizer.open(KINDS[kind](tmp_path_factory.mktemp("turns") / "raw"), SPECIALS)

    @given(conversations)
    @settings(max_examples=50, deadline=None)
    def check(example: Example) -> None:
        expand = Template(name, turns="expand")
        [whole] = encoded(tokenizer, Template(name), example)
        parts = encoded(tokenizer, expand, example)
        supervised = [part.ids[part.generated == 1].tolist() for part in parts]
        assert sum(map(Counter, supervised), Counter()) == Counter(whole.ids[whole.generated == 1].tolist())
        for part in parts:
            assert whole.ids[: len(part)].tolist() == part.ids.tolist()
            begin = int(np.argmax(part.generated))  # one run of generated tokens, to the end
            assert part.generated[begin:].all() and whole.generated[begin : len(part)].all()
        asked = tokenizer.encode(expand.prompt_pieces(example.turns), IMAGE_TOKENS)  # at inference
        assert not asked.generated.any() and asked.ids.tolist() == parts[-1].ids[: len(asked)].tolist()
        [first] = encoded(tokenizer, Template(name, turns="first"), example)
        assert first.ids.tolist() == parts[0].ids.tolist()
        assert first.generated.tolist() == parts[0].generated.tolist()

    check()


def write_talks(root: Path) -> None:
    """Conversations of one, two and three exchanges about an image each."""
    talks = []
    for number in range(TALKS):
        said = [text for turn in range(number % 3 + 1) for text in (f"what is {turn} of {number}?", f"it is {turn}.")]
        talks.append((f"t{number}", number, said))
    write_llava(root, talks)


def pack(root: Path, turns: Turns, workers: int = 1, **changes: Any) -> list[str]:
    content = recipe_dict(root / "raw", root / "out")
    del content["corpora"]["captions"]
    settings = {"corpora": ["talk"], "template": "plain", "seq_len": 160, "epochs": 2, "turns": turns, **changes}
    return prepare(
        make_recipe(root, corpora=content["corpora"], packs={"sft": settings}, max_bad_fraction=0.3), workers
    )


@pytest.fixture(scope="module", params=["every", "first", "expand"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Turns, Path, list[str]]:
    root = tmp_path_factory.mktemp(request.param)
    write_talks(root / "raw")
    return request.param, root, pack(root, request.param)


SAMPLES: dict[Turns, int] = {"every": TALKS, "first": TALKS, "expand": TALKS * 2}


def test_packs_hold_what_the_setting_says_and_count_it(made: tuple[Turns, Path, list[str]]) -> None:
    turns, root, said = made
    reader = PackReader(root / "out" / "packs" / "sft", verify=True)
    drawn = [source.sample for row in reader for source in row.source]
    assert len(drawn) == 2 * len(set(drawn)) == 2 * SAMPLES[turns]
    stats = reader.manifest.corpora["talk"]
    assert reader.manifest.tokens == stats.tokens and reader.manifest.targets == stats.targets
    assert reader.manifest.recipe["turns"] == turns
    assert stats.left_out == (2 * TALKS if turns == "first" else 0)
    assert (stats.repeated > 0) == (turns == "expand")
    notes = [line for line in said if line.startswith("note: packs.sft.corpora.talk: ")]
    kinds = {"every": [], "first": ["24 later answers are dropped"], "expand": ["tokens repeat earlier turns"]}
    assert len(notes) == len(kinds[turns]) and all(kind in line for kind, line in zip(kinds[turns], notes, strict=True))
    shown = io.StringIO()
    show_stats(reader.directory, Console(file=shown, width=200))
    assert ("talk: 24 later answers are dropped" in shown.getvalue()) == (turns == "first")
    assert (" x the tokens of turns: every)" in shown.getvalue()) == (turns == "expand")


def test_expanded_packs_repeat_exactly_what_every_does_not(tmp_path: Path) -> None:
    counts = {}
    for turns in SAMPLES:
        write_talks(tmp_path / turns / "raw")
        pack(tmp_path / turns, turns)
        counts[turns] = PackReader(tmp_path / turns / "out" / "packs" / "sft").manifest.corpora["talk"]
    assert counts["expand"].tokens - counts["expand"].repeated == counts["every"].tokens
    assert counts["expand"].targets == counts["every"].targets > counts["first"].targets


def test_bytes_do_not_depend_on_the_number_of_workers(made: tuple[Turns, Path, list[str]], tmp_path: Path) -> None:
    turns, root, _ = made
    shutil.copytree(root / "raw", tmp_path / "raw")
    pack(tmp_path, turns, workers=2)
    assert tree_hashes(tmp_path / "out") == tree_hashes(root / "out")


def test_a_change_of_the_setting_is_ingested_again(tmp_path: Path) -> None:
    write_talks(tmp_path / "raw")
    for turns in SAMPLES:
        said = pack(tmp_path, turns)
        assert any(line.startswith("ingest (") for line in said)
    fresh = tmp_path / "fresh"
    shutil.copytree(tmp_path / "raw", fresh / "raw")
    pack(fresh, "expand")
    assert tree_hashes(fresh / "out") == tree_hashes(tmp_path / "out")


def test_only_the_excerpts_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    write_talks(tmp_path / "raw")
    pack(tmp_path, "expand")
    lengths = samples(tmp_path)
    limit = max(tokens for name, tokens in lengths.items() if name.endswith("#2"))
    fitting = {name for name, tokens in lengths.items() if tokens <= limit}
    assert 0 < len(lengths) - len(fitting) <= TALKS // 3
    pack(tmp_path, "expand", max_text_tokens=limit - IMAGE_TOKENS)
    assert samples(tmp_path).keys() == fitting
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {entry["sample"] for entry in listed} == lengths.keys() - fitting
    assert {entry["code"] for entry in listed} == {"too-long"}


def samples(root: Path) -> dict[str, int]:
    """Names of the packed samples, and their lengths in tokens."""
    rows = PackReader(root / "out" / "packs" / "sft")
    return {
        source.sample: int(np.count_nonzero(row.segment == segment))
        for row in rows
        for segment, source in enumerate(row.source, start=1)
    }
