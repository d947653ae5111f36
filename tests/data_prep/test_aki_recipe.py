"""The recipe of the paper's mixture, end to end, on faithful fixtures of its eleven corpora."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from data_prep.corpora import build_corpus, with_parity
from data_prep.corpora.choices import PARITY_ORDERS
from data_prep.example import Example, ImageRef, Turn
from data_prep.packs import PackReader
from data_prep.recipe import PackConfig, find_recipe, load_recipe
from data_prep.text.tokenizer import Tokenizer
from data_prep.text.turns import excerpts
from data_prep.verify import verify
from tests.data_prep.raw import make_recipe, prepare
from tests.data_prep.text.test_template import spell
from tests.data_prep.text.test_tokenizer import byte_bpe

FIXTURES = Path(__file__).parents[1] / "fixtures"
DRAWS = 400


def lay_out(root: Path) -> None:
    """Put the fixtures where the recipe expects them; COCO images lie in common folders."""
    shutil.copytree(FIXTURES / "vsr" / "images", root / "coco" / "train2017")
    for corpus in ("vqav2", "gqa", "vsr", "ocrvqa", "aokvqa", "scienceqa", "refcoco", "visual_genome", "llava"):
        shutil.copytree(FIXTURES / corpus, root / corpus)
        for images in (root / corpus).glob("train201*"):
            shutil.copytree(images, root / "coco" / images.name, dirs_exist_ok=True)
    annotations = root / "refcoco" / "finetune_refcoco_train.json"
    shutil.copy(annotations, annotations.with_name("finetune_refcoco+_train.json"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> PackReader:
    folder = tmp_path_factory.mktemp("aki")
    lay_out(folder / "raw")
    content = yaml.safe_load(find_recipe("aki_sft").read_text())
    content["packs"]["sft"]["draws"] = DRAWS
    changes = {key: content[key] for key in ("corpora", "packs", "image_tokens")}
    tokenizer = str(byte_bpe(folder / "tokenizer"))
    prepare(make_recipe(folder, **changes, tokenizer=tokenizer, max_bad_fraction=0.95))  # half of the rows are dirty
    assert any("packs/sft: ok" in line for line in verify(folder / "out"))
    return PackReader(folder / "out" / "packs" / "sft")


def test_the_draws_follow_the_papers_weights(packs: PackReader) -> None:
    draws = {name: stats.draws for name, stats in packs.manifest.corpora.items()}
    assert sum(draws.values()) == DRAWS and len(draws) == 11
    assert all(abs(draws[name] - 0.103 * DRAWS) < 1 for name in draws if name not in ("vsr", "visual_genome"))
    assert (draws["vsr"], draws["visual_genome"]) in {(10, 19), (11, 19), (10, 18)}


def test_prompts_are_those_of_the_paper(packs: PackReader) -> None:
    tokenizer = Tokenizer.load(packs.directory / "tokenizer")
    system = yaml.safe_load(find_recipe("aki_sft").read_text())["packs"]["sft"]["system"].strip()
    asked = {
        "vqav2": "Answer the question using a single word or phrase. ",
        "aokvqa": "Answer with the option's letter from the given choices directly. ",
        "vsr": 'Is it true that "',
        "refcoco": "Provide a short description for this region. <bbox>[",
    }
    seen = set()
    for row in packs:
        for segment, source in enumerate(row.source, start=1):
            at = (row.segment == segment) & (row.modality == 0)
            words = tokenizer.decode(row.input_ids[at], specials=True)
            assert words.startswith(f"<|system|>\n{system}<|end|>\n<|user|>\n")
            if source.dataset in asked:
                assert f"<|user|>\n\n{asked[source.dataset]}" in words  # the image is between the two line ends
                seen.add(source.dataset)
    assert seen == asked.keys()


def test_only_answers_and_their_ends_are_supervised(packs: PackReader) -> None:
    tokenizer = Tokenizer.load(packs.directory / "tokenizer")
    end = tokenizer.id_of("<|end|>")
    for row in packs:
        assert not row.generated[row.modality == 1].any()
        for segment in range(1, len(row.source) + 1):
            at = np.flatnonzero(row.segment == segment)
            assert row.input_ids[at[-1]] == end and row.generated[at[-1]]
            header = tokenizer.id_of("<|assistant|>")
            assert (row.input_ids[at] == header).any() and not row.generated[at][row.input_ids[at] == header].any()


LETTER = "Answer with the option's letter from the given choices directly. "
SHORT = "Answer the question using a single word or phrase. "
AKI = {  # user turn of the released implementation, without its faults, and answer; "|" stands for a lettered option
    "vqav2": (SHORT + "How many cookies can be seen?", "2"),
    "gqa": (SHORT + "Is the car red?", "yes"),
    "ocrvqa": (SHORT + "Who is the author of this book?", "A. Author"),
    "vsr": (SHORT + 'Is it true that "The cat is on top of the suitcase"? Please answer yes or no.', "yes"),
    "aokvqa": (LETTER + "What is the man by the bags awaiting?\nOptions:\n|\n|\n|\n|\n", "cab"),
    "scienceqa": (
        LETTER + "Which of these states is farthest north?\nContext: N/A\nOptions:\n|\n|\n|\n|\n",
        "West Virginia",
    ),
    "scienceqa-hint": (
        LETTER + "Which better describes the fish?\nContext: Select the better answer.\nOptions:\n|\n|\n",
        "It is slippery.",
    ),
    "refcoco": (
        "Provide a short description for this region. <bbox>[0.250, 0.250][0.750, 0.750]</bbox>",
        "the lady with the blue shirt",
    ),
}


def asked_with_parity(corpus: str) -> list[tuple[str, str]]:
    """(user turn, answer) of the samples of the first row of a corpus, or of its first row with a hint."""
    kind, _, hint = corpus.partition("-")
    reader = build_corpus(kind, with_parity(kind, {}), FIXTURES / kind)
    kept = [item for shard in reader.shards() for item in reader.examples(shard) if isinstance(item, Example)]
    first = next(item.id for item in kept if not hint or "Context: N/A" not in str(item.turns[0].parts[-1]))
    same = [item for item in kept if item.id.partition("/order")[0] == first]
    return [(str(item.turns[0].parts[-1]), str(item.turns[1].parts[0])) for item in same]


@pytest.mark.parametrize("corpus", AKI)
def test_with_parity_a_question_is_asked_as_the_released_aki_asks_it(corpus: str) -> None:
    golden, answer = AKI[corpus]
    pattern = re.escape(golden).replace(r"\|", r"([A-Z]\. [^\n]+)")
    samples = asked_with_parity(corpus)
    for asked, given in samples:
        found = re.fullmatch(pattern, asked)
        assert found is not None, asked
        options = dict(option.split(". ", 1) for option in found.groups())
        assert options.get(given, given) == answer, "the label follows its option"
        assert list(options) == list("ABCD"[: golden.count("|")])
    choices = "|" in golden
    assert len(samples) == (PARITY_ORDERS if choices else 1)
    assert len(set(samples)) > 1 or not choices, "options are shuffled"


@pytest.mark.parametrize("corpus", AKI)
def test_with_parity_a_conversation_is_written_as_the_released_aki_writes_it(corpus: str) -> None:
    pack = PackConfig(corpora={"c": 1}, template="phi3", seq_len=64, epochs=1, system="Be kind.", aki_parity=True)
    asked, answer = asked_with_parity(corpus)[0]
    talk = (Turn("user", (ImageRef("i", data=b""), asked)), Turn("assistant", (answer,)))
    more = (Turn("user", ("and now?",)), Turn("assistant", ("no",)))
    template = pack.to_template()
    [excerpt] = excerpts(Example("e", (*talk, *more)), template.turns)
    golden = f"<|system|>\nBe kind.<|end|>\n<|user|>\n[0]\n{asked}<|end|>\n<|assistant|>\n{{{answer}}}{{<|end|>}}"
    assert spell(template.pieces(excerpt.example)) == golden and excerpt.left_out == 1


def test_the_parity_of_a_pack_set_reaches_its_readers(tmp_path: Path) -> None:
    """Two pack sets, with and without parity, from the same corpus."""
    lay_out(tmp_path / "raw")
    corpus = {"type": "aokvqa", "questions": "aokvqa/aokvqa_v1p0_train.json", "images": "coco/train2017"}
    pack = {"corpora": {"aokvqa": 1.0}, "template": "phi3", "seq_len": 512, "draws": 40}
    packs = {"ours": pack, "aki": {**pack, "aki_parity": True}}
    tokenizer = str(byte_bpe(tmp_path / "tokenizer"))
    prepare(make_recipe(tmp_path, corpora={"aokvqa": corpus}, packs=packs, tokenizer=tokenizer, max_bad_fraction=0.95))
    texts: dict[str, list[tuple[str, str]]] = {}
    for name in packs:
        reader = PackReader(tmp_path / "out" / "packs" / name)
        words = Tokenizer.load(reader.directory / "tokenizer")
        texts[name] = [
            (source.sample, words.decode(row.input_ids[(row.segment == number) & (row.modality == 0)], specials=True))
            for row in reader
            for number, source in enumerate(row.source, start=1)
        ]
    assert all("\nOptions:\n" not in text for _, text in texts["ours"])
    asked = re.compile(r"\?\nOptions:\nA\. .*\n<\|end\|>\n<\|assistant\|>\n?[A-D]<\|end\|>$", re.DOTALL)
    assert [text for _, text in texts["aki"] if not asked.search(text)] == []
    questions = {sample for sample, _ in texts["ours"]}
    assert {sample.partition("/")[0] for sample, _ in texts["aki"]} <= questions
    assert len({sample for sample, _ in texts["aki"]}) == min(40, PARITY_ORDERS * len(questions)), "no order twice"


def test_with_parity_a_caption_ends_as_the_released_aki_ends_it() -> None:
    turns = (Turn("user", (ImageRef("i", data=b""),)), Turn("assistant", ("a red ring",)))
    caption = Example("e", turns, kind="document")
    for name in ("caption", "phi3"):
        template = PackConfig(corpora={"c": 1}, template=name, seq_len=64, epochs=1, aki_parity=True).to_template()
        assert spell(template.pieces(caption)) == "[0]{a red ring}{<|endofchunk|>}{<eos>}"
        assert "<|endofchunk|>" in template.specials


@pytest.mark.parametrize(
    "changes",
    [{"template": "plain"}, {"prompts": ["Look: "]}, {"order": "text_first"}, {"turns": "expand"}],
)
def test_parity_refuses_what_the_released_aki_does_not_have(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="aki_parity=true"):
        PackConfig(
            **{"corpora": {"c": 1}, "template": "phi3", "seq_len": 64, "epochs": 1, "aki_parity": True} | changes
        )


def test_shipped_recipes_take_parity_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PT_DIR", "SFT_DIR", "LLM_DIR"):
        monkeypatch.setenv(variable, "/somewhere")
    assert not load_recipe("aki_pt").packs["pt"].aki_parity and not load_recipe("aki_sft").packs["sft"].aki_parity
    monkeypatch.setenv("AKI_PARITY", "true")
    assert load_recipe("aki_pt").packs["pt"].to_template().chunk_end == "<|endofchunk|>"
    assert load_recipe("aki_sft").packs["sft"].to_template().turns == "first"
