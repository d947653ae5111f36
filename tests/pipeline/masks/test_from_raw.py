"""From raw corpora to proved masks: which text an image reads under each turn, prompt and order setting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.packs import PackReader, PackRow
from data_prep.text.tokenizer import Tokenizer
from pipeline.commands.masks import prove_command
from pipeline.masks import Sidecars, dense_mask, prove
from tests.data_prep.raw import make_recipe, png, prepare, write_llava, write_tar

LAYERS = 6
PROMPTS = ["Describe the image.\n", "What is shown?\n"]
SAID = ["what is it?", "a ring.", "and its colour?", "red.", "is it big?", "no."]
PACKS: dict[str, dict[str, Any]] = {
    "plain_pt": {"corpora": ["captions"], "template": "caption"},
    "pt_image_first": {"corpora": ["captions"], "template": "caption", "prompts": PROMPTS},
    "pt_text_first": {"corpora": ["captions"], "template": "caption", "prompts": PROMPTS, "order": "text_first"},
    "sft_image_first": {"corpora": ["talk"], "template": "plain"},
    "sft_text_first": {"corpora": ["talk"], "template": "plain", "order": "text_first"},
    "sft_first": {"corpora": ["talk"], "template": "plain", "turns": "first"},
    "sft_expand": {"corpora": ["talk"], "template": "plain", "turns": "expand"},
    "sft_expand_text_first": {"corpora": ["talk"], "template": "plain", "turns": "expand", "order": "text_first"},
}
"""Dual-order training takes the four sets named by stage and order."""


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("from_raw")
    write_tar(root / "raw" / "captions" / "00000.tar", {f"{n:09d}": (png(n), f"ring {n}") for n in range(6)})
    write_llava(root / "raw", [(f"t{n}", n, SAID) for n in range(4)])
    prepare(make_recipe(root, packs={name: {"seq_len": 200, "epochs": 1, **pack} for name, pack in PACKS.items()}))
    return root / "out" / "packs"


def segments(folder: Path) -> Iterator[tuple[PackRow, np.ndarray[Any, np.dtype[np.bool_]], Tokenizer, list[int]]]:
    """Yield (row, its dense mma mask, tokenizer, places of the segment's tokens) for every segment of a pack folder."""
    reader = PackReader(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for row in reader:
        mask = dense_mask("mma", Sidecars.from_row(row)).numpy()
        for segment in range(1, len(row.source) + 1):
            yield row, mask, tokenizer, np.flatnonzero(row.segment == segment).tolist()


def read_by_image(row: PackRow, mask: Any, tokenizer: Tokenizer, places: list[int]) -> str:
    """Return the text that the first token of the segment's image sees."""
    image = next(at for at in places if row.modality[at])
    seen = [int(row.input_ids[at]) for at in places if mask[image, at] and not row.modality[at]]
    return tokenizer.decode(seen)


@pytest.mark.parametrize("policy", ["mma", "mma_general", "mma_mixed", "prefix", "causal"])
@pytest.mark.parametrize("name", PACKS)
def test_every_row_is_proved(packs: Path, name: str, policy: str) -> None:
    for row in PackReader(packs / name):
        proof = prove(policy, Sidecars.from_row(row), LAYERS)
        assert proof.leak_free and proof.kv_exact and proof.targets == row.n_target > 0


def test_the_command_proves_expanded_packs(packs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove_command([str(packs / "sft_expand"), "--rows", "2", "--layers", "32"]) == 0
    assert capsys.readouterr().out.count("yes") == 2


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("sft_image_first", [SAID[0]]),
        ("sft_text_first", [SAID[0]]),
        ("sft_first", [SAID[0]]),
        ("sft_expand", [SAID[0], "".join(SAID[:3]), "".join(SAID[:5])]),
        ("sft_expand_text_first", [SAID[0], "".join(SAID[:3]), "".join(SAID[:5])]),
    ],
)
def test_the_image_reads_its_turn_or_the_whole_history(packs: Path, name: str, read: list[str]) -> None:
    found = {read_by_image(*segment) for segment in segments(packs / name)}
    assert {text.replace("\n", "") for text in found} == set(read)


@pytest.mark.parametrize("name", ["pt_image_first", "pt_text_first"])
def test_a_prompt_is_read_by_the_image_and_the_caption_stays_causal(packs: Path, name: str) -> None:
    found = set()
    for row, mask, tokenizer, places in segments(packs / name):
        found.add(read_by_image(row, mask, tokenizer, places))
        captions = [at for at in places if row.generated[at]]
        assert tokenizer.decode(row.input_ids[captions]).startswith("ring ")
        for at in captions:
            assert mask[at].nonzero()[0].tolist() == list(range(places[0], at + 1))
            assert not mask[places[0] : at, at].any()
        unlocked = np.triu(mask[np.ix_(places, places)], k=1)
        images = sum(int(row.modality[at]) for at in places)
        texts = len(places) - images - len(captions)
        assert unlocked.sum() == (images * texts if name == "pt_image_first" else 0)
    assert found == set(PROMPTS)


def test_without_a_prompt_a_caption_is_causal(packs: Path) -> None:
    for _, mask, _, places in segments(packs / "plain_pt"):
        assert not np.triu(mask[np.ix_(places, places)], k=1).any()


@pytest.mark.parametrize(
    ("stage", "asked"), [pytest.param("pt", set(PROMPTS), id="pt"), pytest.param("sft", {SAID[0]}, id="sft")]
)
def test_the_two_orders_of_dual_order_training_differ_in_nothing_else(packs: Path, stage: str, asked: set[str]) -> None:
    before: dict[str, set[str]] = {"image_first": set(), "text_first": set()}
    for order, texts in before.items():
        for row, _, tokenizer, places in segments(packs / f"{stage}_{order}"):
            image = next(at for at in places if row.modality[at])
            texts.add(tokenizer.decode(row.input_ids[places[0] : image]))
    assert before == {"image_first": {""}, "text_first": asked}
    one, other = (PackReader(packs / f"{stage}_{order}").manifest for order in before)
    assert (one.targets, one.tokens, one.images) == (other.targets, other.tokens, other.images)
