from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from data_prep.common.errors import UserError
from data_prep.common.yaml_files import read_yaml
from data_prep.images.augment import Augment
from data_prep.recipe import (
    CorpusConfig,
    PackConfig,
    Recipe,
    TokenizerConfig,
    TrainTokenizer,
    load_recipe,
    shipped_recipes,
)
from data_prep.text.template import Template
from tests.data_prep.raw import recipe_dict, write_recipe, write_world
from tests.data_prep.text.test_chat_template import DEFAULT_SYSTEM, tokenizer

VARIABLES = ("NLVR_DIR", "CC12M_DIR", "PT_DIR", "SFT_DIR", "OBELICS_DIR", "LLM_DIR")


def edited(tmp_path: Path, path: str, value: Any) -> str:
    """A recipe file with one key (dotted path) set, or removed where the value is ``...``."""
    content: dict[str, Any] = recipe_dict(tmp_path / "raw", tmp_path / "out")
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return str(write_recipe(tmp_path / "recipe.yaml", content))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "/somewhere")
    monkeypatch.setenv("SMOLLM2_DIR", str(tokenizer(tmp_path / "t", DEFAULT_SYSTEM)))  # its chat template is read
    recipe = load_recipe(name)
    assert recipe.packs and recipe.specials()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sed", 1, "unknown key sed (did you mean 'seed'?)"),
        ("packs.pt.seq_length", 1, "unknown key packs.pt.seq_length (did you mean 'seq_len'?)"),
        ("tokenizer.tran", {}, "unknown key tokenizer.tran (did you mean 'train'?)"),
        ("tokenizer.train.vocab", 9, "unknown key tokenizer.train.vocab (did you mean 'vocab_size'?)"),
        ("image_tokens", ..., "give either image_tokens, for images of one size, or media"),
        ("media", {"image": {"kind": "fixed", "tokens": 4}}, "give either image_tokens, for images of one size, or"),
        ("media", {"imag": 3}, "unknown key media.imag (did you mean 'image'?)"),
        ("packs.pt", {"corpora": ["captions"], "template": "caption", "seq_len": 64, "epochs": 1, "max_images": 1,
                      "max_image_tokens": 9}, "give either max_images or max_image_tokens"),
        ("packs.pt.template", "phi", "packs.pt: template 'phi' is unknown (did you mean 'phi3'?)"),
        ("packs.pt.template", ..., "packs.pt.template is missing"),
        ("packs.pt.seq_len", "long", "packs.pt.seq_len: "),
        ("packs.pt.seq_len", 4, "greater than or equal to 8"),
        ("packs.sft.epochs", 2, "packs.sft: give either draws or epochs"),
        ("packs.pt.epochs", ..., "packs.pt: give either draws or epochs"),
        ("packs.sft.corpora.talk", 0, "every weight must be a number above 0"),
        ("packs.sft.corpora.talk", float("inf"), "every weight must be a number above 0"),
        ("packs.sft.draws", 10**15, "packs.sft.draws: Input should be less than or equal to 1000000000 (found"),
        ("packs.pt.seq_len", 10**12, "packs.pt.seq_len: Input should be less than or equal to 16777216 (found"),
        ("packs.pt.epochs", 10**9, "packs.pt.epochs: Input should be less than or equal to 10000 (found"),
        ("packs.pt.corpora", {"captions": 2.0}, "weights need draws"),
        ("packs.pt.corpora", ["caption"], "packs.pt.corpora.caption is not defined under corpora (did you mean"),
        ("packs.pt.system", "be kind", "has no turns"),
        ("packs.pt.turns", "expand", "has no turns, so turns=expand cannot be used: remove it"),
        ("packs.sft.turns", "all", "packs.sft.turns: Input should be 'every', 'first' or 'expand' (found 'all')"),
        ("packs.pt.order", "text_first", "packs.pt: template 'caption' has no given text to put first"),
        ("image_tokens", 64, "packs.pt.seq_len=64 cannot hold one image of image_tokens=64"),
        ("tokenizer", {}, "tokenizer: name either a path or train"),
        ("out", "", "out: is empty: name a folder"),
        ("root", " ", "root: is empty: name a folder"),
        ("tokenizer", None, "tokenizer: expected a mapping of keys (found None)"),
        ("corpora.own", "llava", "corpora.own: expected a mapping of keys (found 'llava')"),
        ("packs", 3, "packs: expected a mapping of keys (found 3)"),
        ("max_bad_fraction", 1.5, "max_bad_fraction: "),
        ("corpora", {"../up": {"type": "llava"}}, "name '../up' must be made of"),
        ("root", "${NOT_SET_ANYWHERE}/x", "root uses ${NOT_SET_ANYWHERE}, which is not set: export NOT_SET_ANYWHERE="),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_key_and_a_hint(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(edited(tmp_path, path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) or path == "corpora", "without its corpora every pack set is wrong too"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("seed: 1\npacks:\n  pt: {}\n  pt: {}\n", r"r\.yaml: not valid YAML: the key 'pt' occurs twice \(line 4\)"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_merged_key_may_be_overridden() -> None:
    text = "base: &base {seq_len: 64, epochs: 1}\npt: {<<: *base, seq_len: 128}"
    assert read_yaml(text, "r.yaml")["pt"] == {"seq_len": 128, "epochs": 1}


def test_all_errors_of_a_recipe_come_at_once(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "raw").mkdir()
    content["seeed"] = 1
    content["tokenizer"] = "tok"
    content["corpora"]["talk"] |= {"images": "gone", "conversation": "llava.json"}
    content["corpora"]["odd"] = {"type": "lava"}
    content["packs"]["pt"] |= {"draws": 3, "aki_parity": True, "order": "as_written"}
    content["packs"]["sft"]["corpora"] |= {"tlk": 1.0, "cap": 1.0}
    content["packs"]["sft"]["seq_len"] = "long"
    file = str(write_recipe(tmp_path / "recipe.yaml", content))
    with pytest.raises(UserError) as caught:
        load_recipe(file, check_files=True)
    first, *lines = str(caught.value).splitlines()
    assert first == f"recipe.yaml: {len(lines)} problems"
    for part in (
        "unknown key seeed (did you mean 'seed'?)",
        "packs.pt: give either draws or epochs",
        "packs.pt: aki_parity=true needs template caption or phi3, order=image_first and no prompts",
        "packs.sft.seq_len: ",
        "packs.sft.corpora.tlk is not defined under corpora (did you mean 'talk'?)",
        "packs.sft.corpora.cap is not defined under corpora (did you mean 'captions'?)",
        "corpora.captions: tars='captions/*.tar' matches no file",
        "corpora.talk: llava.conversation: unknown option (did you mean 'conversations'?)",
        "corpora.talk: llava.images: folder ",
        "corpora.talk: llava.conversations: file ",
        "corpora.odd: unknown corpus type 'lava' (did you mean 'llava'?)",
    ):
        assert sum(line.startswith(f"  - {part}") for line in lines) == 1, (part, lines)
    assert len(lines) == 11


def test_every_unset_variable_is_named(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "${NOT_SET_A}", tmp_path / "${NOT_SET_B}")
    with pytest.raises(UserError) as caught:
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))
    assert [name in str(caught.value) for name in ("root uses ${NOT_SET_A}", "out uses ${NOT_SET_B}")] == [True, True]


def test_a_missing_root_is_one_problem_not_one_per_file(tmp_path: Path) -> None:
    file = edited(tmp_path, "root", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"recipe\.yaml: root: folder .*nowhere does not exist; the raw data") as caught:
        load_recipe(file, check_files=True)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_is_relative_to_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path / "raw", tars=1, captions=2, talks=2)
    file = edited(tmp_path, "tokenizer", "tok")
    (tmp_path / "tok").mkdir()
    with pytest.raises(UserError, match=rf"tokenizer: {tmp_path}/raw/tok does not exist; .* so write {tmp_path}/tok"):
        load_recipe(file, check_files=True)
    (tmp_path / "tok").rename(tmp_path / "raw" / "tok")
    assert load_recipe(file, check_files=True).tokenizer_path == tmp_path / "raw" / "tok"
    assert load_recipe(edited(tmp_path, "tokenizer", "/abs/tok")).tokenizer_path == Path("/abs/tok")
    assert load_recipe(edited(tmp_path, "tokenizer", "~/tok")).tokenizer_path == Path.home() / "tok"


def test_an_unknown_name_suggests_a_shipped_one() -> None:
    with pytest.raises(UserError, match="did you mean 'nlvr'"):
        load_recipe("nlvrr")


def test_variables_defaults_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAW_HERE", "/raw")
    file = edited(tmp_path, "root", "${RAW_HERE}/${SUB_FOLDER:-sub}")
    assert load_recipe(file).root == "/raw/sub"
    monkeypatch.setenv("SUB_FOLDER", "other")
    assert load_recipe(file, {"out": "elsewhere"}).root == "/raw/other"
    assert load_recipe(file, {"out": "elsewhere"}).out_dir == Path("elsewhere")


def test_a_pack_set_knows_its_template(tmp_path: Path) -> None:
    recipe = load_recipe(edited(tmp_path, "packs.sft.system", "be kind"))
    assert recipe.packs["sft"].to_template() == Template("plain", system="be kind")


@pytest.mark.parametrize("model", [Recipe, CorpusConfig, PackConfig, TokenizerConfig, TrainTokenizer, Augment])
def test_every_key_is_documented(model: type[BaseModel]) -> None:
    undocumented = [name for name, field in model.model_fields.items() if not (field.description or "").strip()]
    assert undocumented == []
