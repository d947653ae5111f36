"""``template: tokenizer``: what a tokenizer's own chat template writes, to the letter, generated where it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from data_prep.recipe import load_recipe
from data_prep.text.chat_template import chat_format_of
from data_prep.text.template import OWN, Template, template_of
from tests.data_prep.raw import make_recipe, prepare, recipe_dict, write_llava, write_recipe
from tests.data_prep.text.test_template import GOLDEN, TWO_TURNS, spell
from tests.data_prep.text.test_tokenizer import byte_bpe

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + QWEN
SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(folder: Path, chat_template: str | None, *, separate: bool = True) -> Path:
    """A small tokenizer with the special tokens of both families and a chat template of its own."""
    made = byte_bpe(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(made / "tokenizer.json"), bos_token="<|begin_of_text|>")
    wrapped.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    wrapped.save_pretrained(made)
    (made / "chat_template.jinja").unlink(missing_ok=True)
    if chat_template is not None and separate:
        (made / "chat_template.jinja").write_text(chat_template)
    elif chat_template is not None:
        config = json.loads((made / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": "default", "template": chat_template}]
        (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("source", "family"), [(LLAMA3, "llama3"), (QWEN, "qwen")])
def test_a_family_s_own_template_writes_what_the_template_of_that_name_writes(
    source: str, family: str, separate: bool, tmp_path: Path
) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", source, separate=separate), "")
    assert spell(Template(OWN, system="be kind", own=own).pieces(TWO_TURNS)) == GOLDEN[family]


@pytest.mark.parametrize(
    ("source", "system", "message"),
    [
        pytest.param(None, "", "its chat template is missing", id="none"),
        pytest.param(
            QWEN.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "",
            r"marks no text as generated \(\{% generation %\}\), so nothing would be supervised",
            id="no-generation",
        ),
        pytest.param(
            QWEN.replace(
                "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>\n"
            ),
            "",
            "marks other text as generated than an answer and the end of its turn",
            id="end-not-supervised",
        ),
        pytest.param(
            QWEN.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"),
            "",
            "does not mark every answer as generated|marks other text",
            id="last-answer-only",
        ),
        pytest.param(DEFAULT_SYSTEM, "", "in a way of its own: set system", id="default-system"),
        pytest.param(
            QWEN.replace("'<|im_start|>' + m.role", "m.role"), "", "opens turns without a special", id="plain"
        ),
        pytest.param("{{ raise_exception('no') }}", "", r"refuses a plain conversation \(no\)", id="raises"),
        pytest.param(
            QWEN.replace("m.content", "m.content.upper()"), "", "does not write every turn once", id="changes"
        ),
        pytest.param(
            QWEN.replace("m.role + '\n'", "m.role + ('!' if loop.index > 5 else '') + '\n'"),
            "",
            "in a way of its own",
            id="third-question-otherwise",
        ),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(
    source: str | None, system: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        chat_format_of(tokenizer(tmp_path / "t", source), system)


def test_a_default_system_turn_is_no_matter_where_the_recipe_gives_one(tmp_path: Path) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", DEFAULT_SYSTEM), "be kind")
    assert spell(Template(OWN, system="be kind", own=own).pieces(TWO_TURNS)) == GOLDEN["qwen"]


def test_packs_supervise_what_the_library_s_own_mask_supervises(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "t", LLAMA3)
    said = [(f"t{n}", None, (f"what is {n}?", f"it is {n}.", "sure?", "yes <|eot_id|>")) for n in range(6)]
    write_llava(tmp_path / "raw", said)
    pack: dict[str, Any] = {"corpora": ["talk"], "template": "tokenizer", "seq_len": 256, "epochs": 1, "shuffle": False}
    corpora = {"talk": {"type": "llava", "conversations": "llava.json", "images": "images"}}
    prepare(make_recipe(tmp_path, tokenizer=str(folder), corpora=corpora, packs={"sft": pack}))
    reader = PackReader(tmp_path / "out" / "packs" / "sft")
    library = PreTrainedTokenizerFast.from_pretrained(folder)
    segments = [(row, np.flatnonzero(row.segment == n + 1)) for row in reader for n in range(len(row.source))]
    assert len(segments) == 6
    for number, (row, places) in enumerate(segments):
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said[number][2])]
        turns[-1]["content"] = "yes"  # a special token that text spells is text to us and a token to the library
        wanted = library.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        masks, ids = wanted["assistant_masks"], wanted["input_ids"]
        kept = len(ids) - 1
        assert row.input_ids[places[:kept]].tolist() == ids[:kept]
        assert row.generated[places[:kept]].tolist() == masks[:kept]
        assert row.input_ids[places[-1]] == ids[-1] and row.generated[places[-1]] == masks[-1] == 1
        assert row.input_ids[places].tolist().count(ids[-1]) == 4
    assert template_of(reader.manifest).own == load_recipe(str(tmp_path / "recipe.yaml")).packs["sft"].chat_format


def test_a_trained_tokenizer_has_no_template(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["packs"]["sft"]["template"] = "tokenizer"
    with pytest.raises(UserError, match=r"packs\.sft\.template=tokenizer: a trained tokenizer has no chat"):
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))
