"""Questions to an exported model: it computes exactly what training computed, in batches and with a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from data_prep.text.encoding import Encoded
from pipeline.config.schema import GateConfig
from pipeline.serving.model import MultimodalModel, Prompt, load_model
from tests.pipeline.model.helpers import IMAGE_TOKENS
from tests.pipeline.serving.helpers import CONVERSATIONS, make_export, picture, user

NEW = 7


def continued(prompt: Prompt, ids: torch.Tensor) -> Prompt:
    """The prompt with a generated run, as in training."""
    extra = {
        "ids": ids.numpy(),
        "modality": 0 * ids.numpy(),
        "instance": 0 * ids.numpy() - 1,
        "generated": 0 * ids.numpy() + 1,
    }
    joined = {
        name: np.concatenate([getattr(prompt.encoded, name), values]).astype(getattr(prompt.encoded, name).dtype)
        for name, values in extra.items()
    }
    return Prompt(Encoded(**joined), prompt.images)


def assert_cached_equals_full(model: MultimodalModel, **options: object) -> None:
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    assert len({len(prompt.encoded) for prompt in prompts}) > 1
    out = model.generate_ids(
        prompts, max_new_tokens=NEW, min_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, **options
    )
    logits = torch.stack(out.logits, dim=1)
    for row, prompt in enumerate(prompts):
        full = model.logits(continued(prompt, out.sequences[row, :-1]))
        wanted = full[len(prompt.encoded) - 1 :]
        assert (logits[row] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2", "gemma3_text", "granite", "smollm3"])
def test_prefill_and_cached_decoding_equal_the_training_forward(family: str, tmp_path: Path) -> None:
    assert_cached_equals_full(load_model(make_export(tmp_path, family)))


GATES = [GateConfig(kind="rave_style", rank=5), GateConfig(kind="rave_style", rank=8, heads="1", per="kv_group")]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.per)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2", "gemma3_text"])
def test_gates_decode_with_a_cache_of_their_own(family: str, gate: GateConfig, tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, family, gate=gate))
    assert_cached_equals_full(model)
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    alone = [model.generate([prompt], max_new_tokens=NEW, num_beams=3)[0] for prompt in prompts]
    assert model.generate(prompts, max_new_tokens=NEW, num_beams=3) == alone
    with pytest.raises(UserError, match="its own cache"):
        model.generate(prompts, cache_implementation="static")


def test_an_export_with_gates_is_refused_by_transformers_which_would_ignore_them(tmp_path: Path) -> None:
    folder = make_export(tmp_path, gate=GATES[0])
    assert not list(folder.glob("*.py"))
    with pytest.raises(ValueError, match=r"model type `mma`"):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_the_gate_matters_where_there_are_images(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, gate=GATES[0]))
    before = [model.logits(model.prompt(CONVERSATIONS[number])) for number in (1, 2)]
    for gate in model.gates:
        gate.strength.zero_()
    image, text = (a - model.logits(model.prompt(CONVERSATIONS[n])) for a, n in zip(before, (1, 2), strict=True))
    assert image.abs().max() > 1e-2
    assert text.abs().max() == 0.0


def test_prefill_with_a_static_cache_equals_it_too(tmp_path: Path) -> None:
    options = {"cache_implementation": "static", "disable_compile": True}
    assert_cached_equals_full(load_model(make_export(tmp_path, "llama")), **options)


@pytest.mark.parametrize(
    "policy", ["causal", "mma_general", "mma_aki", "mixed", "future_full", "mma+0:1=mixed+2:3=causal"]
)
def test_every_policy_prefills_with_its_own_mask(policy: str, tmp_path: Path) -> None:
    assert_cached_equals_full(load_model(make_export(tmp_path, policy=policy)))


def test_concentric_positions_prefill_and_decode_as_in_training(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, policy="cca", patch_tokens=True))
    assert_cached_equals_full(model)


def test_images_read_a_given_history(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path))
    apart = model.logits(model.prompt(CONVERSATIONS[0]))
    model.template = replace(model.template, turns="expand")
    assert_cached_equals_full(model)
    given = model.prompt(CONVERSATIONS[0])
    assert not given.encoded.generated.any()
    assert (model.logits(given) - apart).abs().max() > 1e-2


def test_the_mask_matters(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    models = [
        load_model(make_export(tmp_path / name, policy=policy)) for name, policy in (("a", "mma"), ("b", "causal"))
    ]
    first, second = (model.logits(model.prompt(CONVERSATIONS[1])) for model in models)
    assert (first - second).abs().max() > 1e-2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalModel:
    return load_model(make_export(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_like_its_prompts_alone(model: MultimodalModel, beams: int) -> None:
    prompts = [model.prompt(turns) for turns in CONVERSATIONS]
    together = model.generate(prompts, max_new_tokens=NEW, num_beams=beams)
    assert together == [model.generate([prompt], max_new_tokens=NEW, num_beams=beams)[0] for prompt in prompts]


def test_a_prompt_has_the_ids_of_the_training_prefix(model: MultimodalModel) -> None:
    turns = CONVERSATIONS[0]
    prompt = model.prompt(turns)
    whole = model.prompt((*turns, user("left")))
    assert whole.encoded.ids[: len(prompt.encoded) - 1].tolist() == prompt.encoded.ids[:-1].tolist()
    assert len(prompt.images) == 2
    assert int((prompt.encoded.modality == 1).sum()) == 2 * IMAGE_TOKENS


def test_no_prompts_no_answers(model: MultimodalModel) -> None:
    assert model.generate([]) == []


def test_answers_stop_at_the_first_end(model: MultimodalModel) -> None:
    red = model.tokenizer.encode(model.template.prompt_pieces([user("red")]), 1).ids
    word = [int(index) for index in red if model.tokenizer.decode([int(index)])]
    assert model.answer_text([*word, model.export_config.eos_ids[0], *word]) == "red"


@pytest.mark.parametrize(
    ("turns", "new", "words"),
    [
        pytest.param([user("left " * 400)], 8, "more than the model's 256", id="too-long"),
        pytest.param([user("left")], 300, "fewer new tokens", id="too-many-new"),
        pytest.param([user(ImageRef("torn.png", data=b"\x89PNG torn"), "left")], 8, "torn.png", id="torn-image"),
        pytest.param([user(ImageRef("gone.png", path=Path("gone.png")), "left")], 8, "gone.png", id="no-image"),
    ],
)
def test_errors_name_the_fix(model: MultimodalModel, turns: list[object], new: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.generate([model.prompt(turns)], max_new_tokens=new)  # type: ignore[arg-type]


def test_a_window_shorter_than_the_prompt_is_refused(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, "gemma3_text", sliding_window=30))
    with pytest.raises(UserError, match="sliding window"):
        model.generate([model.prompt([user(picture(1), "left " * 30)])])
