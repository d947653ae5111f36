"""The complete recipe of the paper's mixture, on the faithful fixtures of its eleven corpora."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from data_prep.corpora import CORPORA
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
    """Put the fixtures where the recipe's comments say; COCO's images lie in common folders."""
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
    prepare(make_recipe(folder, **changes, tokenizer=tokenizer, max_bad_fraction=0.95))  # half of the fixtures is dirty
    assert any("packs/sft: ok, " in line for line in verify(folder / "out"))
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
                assert f"<|user|>\n\n{asked[source.dataset]}" in words  # the image stands between the two line ends
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


AKI = {  # written down from the description of the released implementation, its faults left out
    "vqav2": "Answer the question using a single word or phrase. What is on the table?",
    "gqa": "Answer the question using a single word or phrase. Is the lamp on?",
    "ocrvqa": "Answer the question using a single word or phrase. Who wrote this book?",
    "aokvqa": "Answer with the option's letter from the given choices directly. What is this?\nA. a cat\nB. a dog",
    "refcoco": "Provide a short description for this region. <bbox>[0.100, 0.200][0.300, 0.400]</bbox>",
}


@pytest.mark.parametrize("asked", AKI.values(), ids=AKI)
def test_with_parity_a_question_is_written_as_the_released_aki_writes_it(asked: str) -> None:
    pack = PackConfig(corpora={"c": 1}, template="phi3", seq_len=64, epochs=1, system="Be kind.", aki_parity=True)
    talk = (Turn("user", (ImageRef("i", data=b""), asked)), Turn("assistant", ("yes",)))
    more = (Turn("user", ("and now?",)), Turn("assistant", ("no",)))
    template = pack.to_template()
    [excerpt] = excerpts(Example("e", (*talk, *more)), template.turns)
    golden = f"<|system|>\nBe kind.<|end|>\n<|user|>\n[0]\n{asked}<|end|>\n<|assistant|>\n{{yes}}{{<|end|>}}"
    assert spell(template.pieces(excerpt.example)) == golden and excerpt.left_out == 1


def test_the_prompts_of_the_goldens_are_those_of_the_readers() -> None:
    for corpus, asked in AKI.items():
        fields = CORPORA[corpus].model_fields
        prompt = fields["phrase_prompt" if corpus == "refcoco" else "prompt"].default
        assert asked.startswith(prompt.partition("{")[0])


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
