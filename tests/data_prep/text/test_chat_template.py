"""``template: tokenizer`` reproduces a tokenizer's own chat template exactly, or refuses it with the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from data_prep.recipe import load_recipe
from data_prep.text import chat_template, jinja_sandbox
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
GEMMA = (  # google/gemma-2-2b-it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
MISTRAL_SMALL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral Small 3. The current date is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V2 = (  # mistralai/Mistral-7B-Instruct-v0.2: its [INST] is text, not a token
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (  # as in Mistral-7B-Instruct-v0.3, without tools
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + '[/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content | trim + eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
CHATML = (  # teknium/OpenHermes-2.5-Mistral-7B
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_INSTRUCT = (  # meta-llama/Meta-Llama-3-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (  # microsoft/Phi-3.5-mini-instruct, whose last line is an end-of-text token without a generation prompt
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
SPECIALS += ["<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<|system|>", "<|user|>", "<|end|>"]
INST = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


def tokenizer(
    folder: Path,
    chat_template: str | None,
    *,
    separate: bool = True,
    bos: str = "<|begin_of_text|>",
    specials: Sequence[str] = SPECIALS,
) -> Path:
    """A small tokenizer with the special tokens of several families and a chat template of its own."""
    made = byte_bpe(folder)
    names = {"bos_token": bos, "eos_token": "</s>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(made / "tokenizer.json"), **names)
    wrapped.add_special_tokens({"additional_special_tokens": [name for name in specials if name not in names.values()]})
    wrapped.save_pretrained(made)
    (made / "chat_template.jinja").unlink(missing_ok=True)
    if chat_template is not None and separate:
        (made / "chat_template.jinja").write_text(chat_template)
    elif chat_template is not None:
        config = json.loads((made / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": "default", "template": chat_template}]
        (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render in this process, as the child does without its limits: a child takes seconds to start."""
    monkeypatch.setattr(chat_template, "render", jinja_sandbox.render_here)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("source", "family"), [(LLAMA3, "llama3"), (QWEN, "qwen")])
def test_the_own_template_of_a_family_gives_the_named_format(
    source: str, family: str, separate: bool, tmp_path: Path
) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", source, separate=separate), "")
    assert spell(Template(OWN, system="be kind", own=own).pieces(TWO_TURNS)) == GOLDEN[family]


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("source", "system", "message"),
    [
        pytest.param(None, "", "its chat template is missing", id="none"),
        pytest.param(
            QWEN.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "",
            r"no \{% generation %\} marks and does not write the header of an answer as a prompt",
            id="neither-marks-nor-prompt",
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
def test_a_template_that_cannot_be_reproduced_is_refused(
    source: str | None, system: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        chat_format_of(tokenizer(tmp_path / "t", source), system)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("source", "bos", "system", "family"),
    [
        pytest.param(GEMMA3, "<bos>", "be kind", "gemma", id="gemma3"),
        pytest.param(MISTRAL_SMALL, "<s>", "be kind", "mistral", id="mistral-small-3"),
        pytest.param(CHATML, "<s>", "be kind", "chatml", id="chatml"),
        pytest.param(LLAMA3_INSTRUCT, "<|begin_of_text|>", "be kind", "llama3", id="llama3"),
        pytest.param(PHI3, "<s>", "be kind", "phi3", id="phi3"),
        pytest.param(GEMMA, "<bos>", "", "gemma", id="gemma2-without-system"),
        pytest.param(GEMMA3, "<bos>", "", "gemma", id="gemma3-without-system"),
    ],
)
def test_real_templates_without_marks_give_the_named_format(
    source: str, bos: str, system: str, family: str, tmp_path: Path
) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", source, bos=bos, specials=SPECIALS + INST), system)
    derived, named = Template(OWN, system=system, own=own), Template(family, system=system)
    assert spell(derived.pieces(TWO_TURNS)) == spell(named.pieces(TWO_TURNS))
    if system:
        assert spell(named.pieces(TWO_TURNS)) == GOLDEN[family]
    assert derived.prompt_pieces(TWO_TURNS.turns) == named.prompt_pieces(TWO_TURNS.turns)


@pytest.mark.usefixtures("trusted")
def test_a_generated_space_before_an_answer_is_supervised(tmp_path: Path) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", MISTRAL_V3, bos="<s>", specials=SPECIALS + INST), "")
    written = "<s>[INST] [0]\nwhat is it?[/INST]{ }{a ring}{</s>}[INST] sure?[/INST]{ }{yes}{</s>}"
    assert spell(Template(OWN, own=own).pieces(TWO_TURNS)) == written


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("source", "system", "message"),
    [
        pytest.param(GEMMA, "be kind", "takes no system turn: remove system", id="system-refused"),
        pytest.param(MISTRAL_SMALL, "", "in a way of its own: set system", id="default-system"),
        pytest.param(MISTRAL_V2, "", "opens turns without a special token", id="inst-is-text"),
        pytest.param(
            CHATML.replace("message['content'] +", "(message['content'] if loop.last else 'cut') +"),
            "",
            "does not write every turn once",
            id="forgets-turns",
        ),
        pytest.param(
            CHATML.replace(
                "'<|im_end|>' + ", "'<|im_end|>' + ('!' if loop.last and message['role'] == 'assistant' else '') + "
            ),
            "",
            r"has no \{% generation %\} marks, and the conversation up to turn 3 of 5 is written in another way",
            id="last-turn-differs",
        ),
        pytest.param(
            CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"),
            "",
            r"has no \{% generation %\} marks, and its prompt up to turn 3 of 5 is written in another way",
            id="thinking-prompt",
        ),
    ],
)
def test_a_template_without_marks_that_is_not_exact_is_refused(
    source: str, system: str, message: str, tmp_path: Path
) -> None:
    specials = SPECIALS if source == MISTRAL_V2 else SPECIALS + INST
    with pytest.raises(UserError, match=message):
        chat_format_of(tokenizer(tmp_path / "t", source, bos="<s>", specials=specials), system)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 5 s or 512 MiB",
            id="endless-loop",
        ),
        pytest.param("{{ 'x' * 10000000000 }}", r"refuses a plain conversation \(MemoryError\)", id="huge-string"),
        pytest.param(
            "{{ messages[0].content * 20000000 }}", r"\(writes more than 1,048,576 characters\)", id="long-output"
        ),
        pytest.param(
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded", id="recursion"
        ),
        pytest.param("{{ ''.__class__.__mro__ }}", "unsafe", id="escape"),
        pytest.param("{% for %}", r"refuses a plain conversation \(", id="syntax"),
        pytest.param("x" * 1_048_577, "is larger than 1,048,576 characters", id="large-template"),
    ],
)
def test_a_hostile_template_ends_in_one_line_within_seconds(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "</s>", "special": True}]}))
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match=message) as caught:
        chat_format_of(tmp_path, "")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_failing_child_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "_CHILD", "raise SystemExit('no such library')")
    with pytest.raises(UserError, match=r"its chat template cannot be rendered \(no such library\)"):
        chat_format_of(tokenizer(tmp_path / "t", "anything"), "")


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '{"added_tokens": [1]}', '{"added_tokens": {"a": 1}}'])
def test_a_damaged_tokenizer_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"needs a readable tokenizer\.json") as caught:
        chat_format_of(tmp_path, "")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("trusted")
def test_a_default_system_turn_does_not_matter_if_the_recipe_sets_system(tmp_path: Path) -> None:
    own = chat_format_of(tokenizer(tmp_path / "t", DEFAULT_SYSTEM), "be kind")
    assert spell(Template(OWN, system="be kind", own=own).pieces(TWO_TURNS)) == GOLDEN["qwen"]


def test_packs_supervise_exactly_what_the_mask_of_transformers_marks(tmp_path: Path) -> None:
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


def test_a_trained_tokenizer_has_no_chat_template(tmp_path: Path) -> None:
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    content["packs"]["sft"]["template"] = "tokenizer"
    with pytest.raises(UserError, match=r"packs\.sft\.template=tokenizer: a trained tokenizer has no chat"):
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", content)))
