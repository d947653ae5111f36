"""``mma look``: image states move with the question under MMA, and not by a bit under a causal mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.common.errors import UserError
from data_prep.example import Turn
from data_prep.packs import PackReader
from pipeline.cli import main
from pipeline.masks import POLICIES
from pipeline.report.look import MAPS, Look, heat_map, look_page, looks
from pipeline.report.movement import Movement, movements
from pipeline.serving.model import MultimodalModel, load_model
from tests.pipeline.serving.helpers import assistant, make_export, picture, user
from tests.pipeline.serving.test_evaluate import trained_on

QUESTIONS = "what colour is the circle", "how many squares are there one two"
SAFE = [name for name, policy in POLICIES.items() if not policy.leaks]


def moved(model: MultimodalModel, *conversations: Any) -> list[Movement]:
    return movements(model, *(model.prompt(list(turns)) for turns in conversations))


def asked(model: MultimodalModel, image: Any) -> list[Movement]:
    return moved(model, *([user(image, question)] for question in QUESTIONS))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token per patch."""
    return make_export(tmp_path_factory.mktemp("grid"), patch_tokens=True)


@pytest.fixture(scope="module")
def model(export: Path) -> MultimodalModel:
    return load_model(export)


def test_states_move_after_the_first_layer_under_mma_and_never_under_a_causal_mask(model: MultimodalModel) -> None:
    own, causal = asked(model, picture(1))
    assert (own.policy, causal.policy) == ("mma", "causal")
    assert own.values_LN.shape == (model.spec.layers + 1, model.spec.image_tokens)
    assert not causal.values_LN.any()
    assert not own.values_LN[0].any() and (own.values_LN[1:] > 1e-6).all()


def test_movement_is_one_minus_the_cosine_of_the_states(model: MultimodalModel) -> None:
    import torch

    prompts = [model.prompt([user(picture(1), question)]) for question in QUESTIONS]
    states = []
    for prompt in prompts:  # without padding, with the plan of training
        inputs = model.inputs(prompt)
        states.append(model.stage.decode(model.stage.embed(inputs), inputs)[0, inputs.image_positions].double())
    expected = 1 - torch.cosine_similarity(*states, dim=-1)
    found = movements(model, *prompts)[0].values_LN[-1]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-7)


def test_an_answer_does_not_move_the_image(model: MultimodalModel) -> None:
    image, question = picture(2), user("how many squares are there")
    own, causal = moved(
        model,
        [user(image, "what colour is the circle"), assistant("red"), question],
        [user(image, "what colour is the circle"), assistant("blue yellow three"), user("left")],
    )
    assert not own.values_LN.any() and not causal.values_LN.any()


@pytest.mark.parametrize("policy", [name for name in SAFE if name not in ("causal", "cca")])
def test_every_policy_has_its_causal_twin(policy: str, tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path, patch_tokens=True, policy=policy))
    own, causal = asked(model, picture(1))
    assert not causal.values_LN.any()
    sees_questions = policy not in ("mixed", "future_v2v")
    assert own.values_LN[1:].any() == sees_questions


def test_a_causal_model_has_no_twin(tmp_path: Path) -> None:
    (only,) = asked(load_model(make_export(tmp_path, policy="causal")), picture(1))
    assert not only.values_LN.any()


def test_only_tokens_that_move_are_coloured() -> None:
    image = Image.new("RGB", (20, 40), "blue")
    still = heat_map(image, np.zeros(4), 0.5, (2, 2))
    half = np.asarray(heat_map(image, np.array([0, 0.5, 0, 0]), 0.5, (2, 2))).astype(int)
    changed = (half != np.asarray(still)).any(-1)
    height, width = changed.shape
    assert changed[: height // 2, width // 2 :].all() and changed.sum() == height * width // 4
    strip = np.asarray(heat_map(image, np.array([0, 1.0]), 1.0, None))
    assert (strip[0, 0] == 255).all() and (strip[0, -1] != 255).any()


def test_layers_between_the_first_and_the_last_are_drawn() -> None:
    look = Look("m", Image.new("RGB", (4, 4)), ("a", "b"), [Movement("mma", np.zeros((33, 4)))], (2, 2))
    assert look.layers[0] == 0 and look.layers[-1] == 32 and len(look.layers) == MAPS
    assert b"exactly 0 in every layer" in look_page(look)


def test_the_command_writes_a_page_or_a_picture(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(picture(1).read())
    words = ["look", str(tmp_path / "photo.png"), *QUESTIONS, "--model", str(export), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "look.html")]) == 0
    assert "causal: 1 - cosine after the last layer: mean 0, largest 0" in capsys.readouterr().out
    page = (tmp_path / "look.html").read_text()
    assert page.count("<figure>") == 2 * 4 and "exactly 0 in every layer" in page and QUESTIONS[1] in page
    assert main([*words, "--out", str(tmp_path / "look.png")]) == 0
    assert Image.open(tmp_path / "look.png").width > 600
    assert main([*words[:2], "left", "left", *words[4:]]) == 2
    assert main([*words, "--out", str(tmp_path)]) == 2


def test_a_connector_without_a_grid_has_strips(tmp_path: Path) -> None:
    model = load_model(make_export(tmp_path))
    assert model.spec.mask_grid is None
    page = look_page(Look("m", Image.new("RGB", (9, 9)), QUESTIONS, asked(model, picture(1)), None)).decode()
    assert "a strip, one cell per token" in page


def test_prompts_that_cannot_be_compared_are_refused(model: MultimodalModel) -> None:
    with pytest.raises(UserError, match="no picture"):
        moved(model, [user("left")], [user("one two")])
    with pytest.raises(UserError, match="different places"):
        moved(model, [user(picture(1), "left")], [Turn("system", ("one two three",)), user(picture(1), "left")])


def test_pictures_of_packs(small_demo: Path, tmp_path: Path) -> None:
    packs = PackReader(small_demo / "packs/eval")
    trained_on(packs, tmp_path / "model")
    (first, second) = looks(load_model(tmp_path / "model"), "m", packs, 2)
    for look in (first, second):
        assert look.questions[0] != look.questions[1]
        assert not look.movements[-1].values_LN.any()
