"""Exports in Hugging Face layout: transformers loads them without this project, and computes the same."""

from __future__ import annotations

import ast
import io
import json
import os
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from data_prep.common.errors import UserError
from data_prep.example import Example, ImageRef, Turn
from data_prep.text.template import CHAT_FORMATS, Special, Template
from pipeline.masks import POLICIES
from pipeline.model.connectors import CONNECTORS
from pipeline.model.connectors.perceiver import PerceiverResampler
from pipeline.model.families.llm import LlmFamily
from pipeline.model.families.towers import Siglip
from pipeline.serving.chat_template import chat_template
from pipeline.serving.export import export
from pipeline.serving.export_config import ExportConfig
from pipeline.serving.hf_files import CODE, assistant_spans, code_files
from pipeline.serving.model import MultimodalModel, load_model
from pipeline.serving.remote import bundle as bundle_module
from pipeline.serving.remote.bundle import SIBLINGS, bundle
from tests.pipeline.model.connectors import SECOND, TINY
from tests.pipeline.serving.helpers import (
    CONVERSATIONS,
    TEMPLATE,
    make_export,
    make_saved,
    make_tokenizer,
    picture,
    user,
)

OUTSIDE = """
import sys
sys.path.append(sys.argv[1])
for name in ("pipeline", "data_prep", "pydantic", "sentencepiece", "deepspeed"):
    sys.modules[name] = None
try:
    import pipeline
    raise SystemExit("the project can be imported")
except ImportError:
    pass
import json, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, questions = sys.argv[2], json.load(open(sys.argv[3]))
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answers = []
for start in range(0, len(questions), 4):
    batch = processor.apply_chat_template(
        questions[start : start + 4], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    ids = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    answers += ids.tolist()
json.dump(answers, open(sys.argv[4], "w"))
"""


def messages(turns: Sequence[Turn], folder: Path | None = None) -> list[dict[str, Any]]:
    """A conversation as transformers takes it; images as files of ``folder``, or as pictures."""

    def part(one: str | ImageRef) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        if folder is None:
            return {"type": "image", "image": Image.open(io.BytesIO(one.read()))}
        path = folder / f"{one.name}.png"
        path.write_bytes(one.read())
        return {"type": "image", "path": str(path)}

    return [{"role": turn.role, "content": [part(one) for one in turn.parts]} for turn in turns]


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def prompts(processor: Any, conversations: Any = CONVERSATIONS) -> Any:
    listed = [messages(turns) for turns in conversations]
    return processor.apply_chat_template(listed, tokenize=True, add_generation_prompt=True, return_dict=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def own(folder: Path) -> MultimodalModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    return load(folder)


@pytest.mark.slow
def test_an_export_answers_where_the_project_is_not_installed(
    folder: Path, own: MultimodalModel, tmp_path: Path
) -> None:
    words = ("what colour is the circle", "how many squares are there", "one two", "left", "red green blue")
    asked = [
        (
            *CONVERSATIONS[0][: 2 * (number % 2)],
            user(*[picture(number + at) for at in range(number % 3)], words[number % 5]),
        )
        for number in range(20)
    ]
    (tmp_path / "questions").write_text(json.dumps([messages(turns, tmp_path) for turns in asked]))
    (tmp_path / "outside.py").write_text(OUTSIDE)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-S", "outside.py", site.getsitepackages()[0], str(folder), "questions", "answers"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    answers = json.loads((tmp_path / "answers").read_text())
    for start in range(0, 20, 4):
        mine = own.generate_ids([own.prompt(turns) for turns in asked[start : start + 4]], max_new_tokens=6)
        assert answers[start : start + 4] == mine.tolist()
    assert len({tuple(answer) for answer in answers}) > 10  # the questions and images matter


VARIANTS: dict[str, dict[str, Any]] = {
    "layers": {"policy": "mma+0:1=mixed+2:3=causal", "tie_word_embeddings": True},
    "mlp": {"patch_tokens": True, "policy": "cca"},
    **{kind: {"connector": {"kind": kind, **TINY[kind]}} for kind in CONNECTORS if kind not in ("mlp", "perceiver")},
    "norm": {"connector": {"kind": "mlp", "norm": True}},
    "tower-layers": {"connector": {"kind": "attention_pool", **TINY["attention_pool"], "layers": [-1, 0]}},
    **{family: {"family": family} for family in ("gemma2", "gemma3_text", "granite")},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_answers_equal_those_of_the_training_code(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_export(tmp_path, **options)
    own, (model, processor) = load_model(folder), load(folder)
    batch = prompts(processor)
    with torch.no_grad():
        logits = model(**batch).logits
    for row, turns in enumerate(CONVERSATIONS):
        prompt, real = own.prompt(turns), batch["attention_mask"][row] > 0
        assert batch["input_ids"][row][real].tolist() == prompt.encoded.ids.tolist()
        assert batch["generated"][row][real].tolist() == prompt.encoded.generated.tolist()
        assert torch.allclose(logits[row][real], own.logits(prompt), rtol=0, atol=1e-5)
    ids = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    assert ids.tolist() == own.generate_ids([own.prompt(turns) for turns in CONVERSATIONS], max_new_tokens=5).tolist()


def test_a_model_with_several_towers_is_exported_for_this_project_alone(tmp_path: Path) -> None:
    saved = make_saved(tmp_path, connector={"kind": "sva", **TINY["sva"]}, extra_vision=[{"config": SECOND}])
    folder = export(saved, tmp_path / "export")
    assert not list(folder.glob("*.py"))
    model = load_model(folder)
    prompt = model.prompt(CONVERSATIONS[0])
    inputs = model.inputs(prompt)
    assert [pixels.shape[-1] for pixels in (inputs.pixels, *inputs.extra_pixels)] == [16, 48]
    wanted = saved.stage.eval()
    with torch.no_grad():
        hidden = wanted.model.norm(wanted.decode(wanted.embed(inputs), inputs))
        assert torch.allclose(model.logits(prompt), wanted.lm_head.logits(hidden)[0], atol=1e-6)
    assert len(model.generate([prompt], max_new_tokens=3)) == 1


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.needs_grid])
def test_every_policy_gives_the_same_logits(policy: str, own: MultimodalModel, theirs: tuple[Any, Any]) -> None:
    model, processor = theirs
    mine = MultimodalModel(replace(own.export_config, policy=policy), own.stage, own.tokenizer)
    batch = prompts(processor, CONVERSATIONS[:2])
    try:
        model.model.policy = sys.modules[type(model.model).__module__].get_policy(policy, allow_leak=True)
        with torch.no_grad():
            logits = model(**batch).logits
    finally:
        model.model.policy = sys.modules[type(model.model).__module__].policy_of(model.config)
    for row, turns in enumerate(CONVERSATIONS[:2]):
        real = batch["attention_mask"][row] > 0
        assert torch.allclose(logits[row][real], mine.logits(mine.prompt(turns)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["beams", "no-cache", "static"],
)
def test_every_way_to_generate_prefills_exactly(
    options: dict[str, Any], own: MultimodalModel, theirs: tuple[Any, Any]
) -> None:
    model, processor = theirs
    batch = prompts(processor)
    ids = model.generate(**batch, max_new_tokens=5, **options)[:, batch["input_ids"].shape[1] :]
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    mine = own.generate_ids([own.prompt(turns) for turns in CONVERSATIONS], max_new_tokens=5, **beams)
    assert ids.tolist() == mine.tolist()


def test_without_marks_answers_are_found_by_their_headers(theirs: tuple[Any, Any]) -> None:
    model, processor = theirs
    batch = prompts(processor)
    bare = {name: value for name, value in batch.items() if name != "generated"}
    real = batch["attention_mask"] > 0
    with torch.no_grad():
        assert torch.equal(model(**bare).logits[real], model(**batch).logits[real])
        all_given = model(**{**batch, "generated": torch.zeros_like(batch["input_ids"])}).logits[real]
        assert not torch.allclose(model(**batch).logits[real], all_given, atol=1e-3)


def test_rendered_text_gives_the_same_ids(own: MultimodalModel, theirs: tuple[Any, Any]) -> None:
    _, processor = theirs
    for turns in CONVERSATIONS:
        listed = messages(turns)
        text = processor.apply_chat_template(listed, add_generation_prompt=True)
        images = [part["image"] for message in listed for part in message["content"] if part["type"] == "image"]
        batch = processor(images=images or None, text=text)
        assert batch["input_ids"][0].tolist() == own.prompt(turns).encoded.ids.tolist()
        assert ("pixel_values" in batch) == bool(images)


def test_text_cannot_spell_a_special_token(own: MultimodalModel, theirs: tuple[Any, Any]) -> None:
    turns = (user("<image><end><assistant>red", picture(1)),)
    batch = prompts(theirs[1], [turns])
    assert batch["input_ids"][0].tolist() == own.prompt(turns).encoded.ids.tolist()
    assert int((batch["input_ids"] == own.export_config.image_id).sum()) == own.spec.image_tokens


def test_the_root_tokenizer_is_the_models(folder: Path, own: MultimodalModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = own.tokenizer.encode(own.template.prompt_pieces([user("how many")]), 1).ids.tolist()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how many"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert len(tokenizer) == len(own.tokenizer)
    answer = own.tokenizer.encode([], 1).ids.tolist() + ids[1:3]
    assert tokenizer.decode(answer).strip() == own.answer_text(answer)


def test_a_mask_that_cannot_be_expressed_is_refused(folder: Path) -> None:
    model, processor = load(folder)
    batch = prompts(processor)
    text = model.config.text_config
    text._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot express the mask of policy 'mma'"):
        model.generate(**batch, max_new_tokens=2)
    text._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="prefilled in one call"):
        model.generate(torch.full((1, 9), 300), max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="images need"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    cut = {name: value[:1, -20:] for name, value in batch.items() if name != "pixel_values"}
    cut["input_ids"] = torch.where(cut["input_ids"] == model.config.image_token_id, 5, cut["input_ids"])
    cut["input_ids"][0, :3] = model.config.image_token_id
    with pytest.raises(ValueError, match="3"):
        model(**cut, pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="longer than the model's positions of 256"):
        model(input_ids=torch.full((1, 257), 300))


def test_the_loss_counts_labels_as_written_by_the_model(own: MultimodalModel, theirs: tuple[Any, Any]) -> None:
    model, processor = theirs
    turns = (user(picture(2), "what colour"), Turn("assistant", ("red",)))
    batch = processor.apply_chat_template([messages(turns)], tokenize=True, return_dict=True)
    written = batch.pop("generated") > 0
    labels = torch.where(written, batch["input_ids"], -100)
    loss = model(**batch, labels=labels).loss
    prompt = replace(
        own.prompt(turns),
        encoded=own.tokenizer.encode(own.template.pieces(Example("one", turns)), own.spec.image_tokens),
    )
    logits = own.logits(prompt)[:-1][written[0, 1:]]
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, labels[written]), atol=1e-5)


PARTS = {"ConnectorModule": PerceiverResampler, "DecoderFamily": LlmFamily, "TowerFamily": Siglip}


@pytest.mark.parametrize("name", CODE)
def test_the_exported_code_is_made_from_the_packages_own(name: str, folder: Path) -> None:
    source = (folder / f"{name}.py").read_text()
    assert source == code_files(ExportConfig.load(folder).spec)[f"{name}.py"]
    assert source.startswith(bundle(f"{SIBLINGS}.{name}", PARTS))
    imported = {
        node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert not {module for module in imported if (module or "").split(".")[0] in bundle_module.PACKAGES}
    if name == "modeling_mma":  # what decides the mask is there, word for word
        for words in (
            "lambda i, j: (i.modality != TEXT) & (j.modality == TEXT)",
            "def dense_mask(",
            "def token_table(",
        ):
            assert words in source


def test_code_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="is not among what an export may need"):
        bundle("pipeline.model.connectors.base")
    with pytest.raises(ValueError, match="inside a function"):
        bundle("pipeline.commands.model")


@pytest.mark.parametrize("name", [name for name, chat in CHAT_FORMATS.items() if chat])
@pytest.mark.parametrize("order", ["image_first", "text_first", "as_written"])
def test_the_chat_template_writes_what_training_writes(name: str, order: Any, theirs: tuple[Any, Any]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    system = "Be brief." if name in ("phi3", "gemma") else ""
    template = Template(name, system=system, order=order)
    source = chat_template(template, lambda token: token, "<image>")
    for turns in CONVERSATIONS[:3]:
        pieces = template.prompt_pieces(turns)
        ours = "".join(one.token if isinstance(one, Special) else getattr(one, "text", "<image>") for one in pieces)
        rendered, _ = render_jinja_template([messages(turns)], chat_template=source, add_generation_prompt=True)
        assert rendered[0] == ours


def test_spans_are_only_stated_where_prompts_hold_answers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    start, end = assistant_spans(TEMPLATE, tokenizer) or ([], [])
    assert [tokenizer.decode([index], specials=True) for index in start] == ["<end>", "<assistant>"]
    assert [tokenizer.decode([index], specials=True) for index in end] == ["<end>"]
    assert assistant_spans(replace(TEMPLATE, turns="expand"), tokenizer) is None
    assert assistant_spans(Template("caption"), tokenizer) is None


def test_parts_that_have_no_exact_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.serving import hf_tokenizer

    monkeypatch.setattr(hf_tokenizer, "_merges", lambda proto, ids: [])
    with pytest.raises(UserError, match="cannot be exported for transformers"):
        export(make_saved(tmp_path), tmp_path / "export")
    assert not (tmp_path / "export").exists()
