"""Prompts of captions: drawn for every draw, inserted where the template writes them, never supervised."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.example import Example, ImageRef, Turn
from data_prep.ingest.prompts import NO_PROMPT, PromptDraws
from data_prep.packs import PackReader
from data_prep.recipe import load_recipe, read_prompts
from data_prep.text.template import Order, Template
from data_prep.text.tokenizer import Tokenizer
from tests.data_prep.raw import make_recipe, prepare, recipe_dict, tree_hashes, write_recipe, write_world

PROMPTS = ["Look: ", "What do you see here?\n", "Caption: "]
EPOCHS, CAPTIONS, IMAGE_TOKENS = 8, 60, 4


def pack(root: Path, workers: int = 1, **changes: Any) -> PackReader:
    sets = recipe_dict(root / "raw", root / "out")["packs"]
    pt = {**sets["pt"], "epochs": EPOCHS, "seq_len": 128, "prompts": PROMPTS, **changes}
    prepare(make_recipe(root, packs={"pt": pt, "sft": {**sets["sft"], "prompts": PROMPTS}}), workers)
    return PackReader(root / "out" / "packs" / "pt", verify=True)


@pytest.fixture(scope="module", params=["image_first", "text_first"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Order, Path, PackReader]:
    root = tmp_path_factory.mktemp(request.param)
    write_world(root / "raw")
    return request.param, root, pack(root, order=request.param)


def test_every_caption_is_written_as_the_template_writes_it(made: tuple[Order, Path, PackReader]) -> None:
    order, _, reader = made
    tokenizer = Tokenizer.load(reader.directory / "tokenizer")
    template = Template("caption", prompts=tuple(PROMPTS), order=order)
    drawn: dict[str, Counter[str]] = defaultdict(Counter)
    for row in reader:
        for segment, source in enumerate(row.source, start=1):
            at = row.segment == segment
            caption = f"a caption about {int(source.sample[-9:])} things"
            turns = (Turn("user", (ImageRef("p", data=b""),)), Turn("assistant", (caption,)))
            example = Example(source.sample, turns, kind="document")
            wanted = {prompt: tokenizer.encode(template.pieces(example, prompt), IMAGE_TOKENS) for prompt in PROMPTS}
            ids, generated = row.input_ids[at].tolist(), row.generated[at].tolist()
            [prompt] = [prompt for prompt, one in wanted.items() if one.ids.tolist() == ids]
            assert wanted[prompt].generated.tolist() == generated
            assert tokenizer.decode(row.input_ids[at & (row.generated == 1)]) == caption
            drawn[source.sample][prompt] += 1
    total = sum(drawn.values(), Counter())
    assert len(drawn) == CAPTIONS and total.total() == CAPTIONS * EPOCHS
    assert all(abs(total[prompt] / total.total() - 1 / 3) < 0.1 for prompt in PROMPTS)
    assert sum(len(prompts) > 1 for prompts in drawn.values()) > CAPTIONS * 0.9  # drawn anew in every epoch


def test_counts_hold_the_prompts(made: tuple[Order, Path, PackReader]) -> None:
    _, _, reader = made
    rows = list(reader)
    assert reader.manifest.tokens == sum(int(np.count_nonzero(row.segment)) for row in rows)
    assert reader.manifest.tokens == reader.manifest.corpora["captions"].tokens
    assert reader.manifest.targets == reader.manifest.corpora["captions"].targets == sum(row.n_target for row in rows)


def test_bytes_do_not_depend_on_the_number_of_workers(made: tuple[Order, Path, PackReader], tmp_path: Path) -> None:
    order, root, _ = made
    shutil.copytree(root / "raw", tmp_path / "raw")
    pack(tmp_path, 2, order=order)
    assert tree_hashes(tmp_path / "out") == tree_hashes(root / "out")


def test_conversations_beside_captions_take_no_prompt(made: tuple[Order, Path, PackReader]) -> None:
    _, root, _ = made
    reader = PackReader(root / "out" / "packs" / "sft")
    tokenizer = Tokenizer.load(reader.directory / "tokenizer")
    for row in reader:
        for segment, source in enumerate(row.source, start=1):
            text = tokenizer.decode(row.input_ids[(row.segment == segment) & (row.modality == 0)])
            assert any(prompt in text for prompt in PROMPTS) == (source.dataset == "captions")


def test_room_is_kept_for_the_longest_prompt(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    plain = pack(tmp_path, prompts=[])
    longest = max(int(np.bincount(row.segment)[1:].max()) for row in plain) - IMAGE_TOKENS
    pack(tmp_path, prompts=[], max_text_tokens=longest)
    with pytest.raises(UserError, match="too-long"):
        pack(tmp_path, max_text_tokens=longest)
    tokenizer = Tokenizer.load(plain.directory / "tokenizer")
    room = max(len(tokenizer.encode(Template("caption").pieces(_words(one)), 1)) - 1 for one in PROMPTS)
    pack(tmp_path, max_text_tokens=longest + room)


def _words(text: str) -> Example:
    return Example("w", (Turn("user", (text,)),), kind="document")


def test_draws_depend_on_seed_and_corpus_and_spare_what_takes_none() -> None:
    prompted = np.arange(3000) % 3 > 0
    first = PromptDraws(8, 1, "a").take(prompted)
    assert (first[~prompted] == NO_PROMPT).all() and set(first[prompted].tolist()) == set(range(8))
    pieces = PromptDraws(8, 1, "a")
    assert np.array_equal(
        first, np.concatenate([pieces.take(part) for part in np.split(prompted, [1, 100, 101, 2500])])
    )
    others = [PromptDraws(8, 2, "a").take(prompted), PromptDraws(8, 1, "b").take(prompted)]
    assert all(0.05 < np.mean(first[prompted] == other[prompted]) < 0.2 for other in others)
    assert (PromptDraws(0, 1, "a").take(prompted) == NO_PROMPT).all()


def test_the_shipped_prompts_are_short_distinct_lines() -> None:
    prompts = read_prompts("describe.txt")
    assert len(set(prompts)) == len(prompts) >= 8
    assert all(prompt.endswith("\n") and prompt.count("\n") == 1 and len(prompt) < 60 for prompt in prompts)


@pytest.mark.parametrize("name", ["aki_pt", "cc12m"])
def test_shipped_recipes_take_prompts_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PT_DIR", "CC12M_DIR", "LLM_DIR"):
        monkeypatch.setenv(variable, "/somewhere")
    assert load_recipe(name).packs["pt"].prompts == ()
    monkeypatch.setenv("PT_PROMPTS", "describe.txt")
    assert load_recipe(name).packs["pt"].prompts == read_prompts("describe.txt")


def test_shipped_recipes_take_orders_and_turns_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PT_DIR", "SFT_DIR", "LLM_DIR"):
        monkeypatch.setenv(variable, "/somewhere")
    plain = load_recipe("aki_sft").packs["sft"]
    assert (plain.order, plain.turns, load_recipe("aki_pt").packs["pt"].order) == (
        "image_first",
        "every",
        "image_first",
    )
    for variable, value in (("PT_PROMPTS", "describe.txt"), ("PT_ORDER", "text_first"), ("SFT_ORDER", "text_first")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SFT_TURNS", "expand")
    set_ = load_recipe("aki_sft").packs["sft"]
    assert (set_.order, set_.turns, load_recipe("aki_pt").packs["pt"].order) == ("text_first", "expand", "text_first")


def test_a_file_of_prompts_may_be_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("  One. \n\nTwo.\n")
    assert read_prompts(str(tmp_path / "mine.txt")) == ("One.\n", "Two.\n")


def test_a_prompt_of_a_list_stands_apart_from_the_caption_as_one_of_a_file_does(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["packs"]["pt"]["prompts"] = ["One.", "Look: ", "Two.\n"]
    recipe = load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))
    assert recipe.packs["pt"].prompts == ("One.\n", "Look: ", "Two.\n")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("describe", r"packs\.pt.*'describe' is neither a text file nor a shipped one \(describe\.txt\)"),
        ("{tmp}/empty.txt", "holds no line of text"),
        ("{tmp}/bytes.txt", "cannot be read"),
        (["Look: ", " "], "every prompt must hold text"),
        (["a\0b"], r"U\+0000 is not allowed"),
        (7, r"packs\.pt\.prompts"),
    ],
)
def test_wrong_prompts_are_refused(tmp_path: Path, prompts: Any, message: str) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["packs"]["pt"]["prompts"] = prompts.format(tmp=tmp_path) if isinstance(prompts, str) else prompts
    with pytest.raises(UserError, match=message):
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))
