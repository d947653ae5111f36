"""The recipe of the paper's mixture, whole, on the faithful fixtures of its eleven corpora."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.packs import PackReader
from data_prep.recipe import find_recipe
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.data_prep.raw import make_recipe, prepare
from tests.data_prep.test_tokenizer import byte_bpe

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
    assert len(list(verify(folder / "out"))) == 2
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
