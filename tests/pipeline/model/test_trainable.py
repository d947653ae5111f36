"""The rule of what is trained, on names; and counts and costs that follow it."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.common.errors import UserError
from pipeline.config.flags import parse
from pipeline.config.schema import RunConfig, TrainSection
from pipeline.model.counts import ParamCounts
from pipeline.model.trainable import Trainable
from pipeline.model.weights import parameter_shapes
from tests.pipeline.model.helpers import tiny_spec


def rule(*freeze: str, tied: bool = False, **train: Any) -> Trainable:
    spec = tiny_spec(tie_word_embeddings=tied)
    section = TrainSection.model_validate({"freeze": list(freeze), **train})
    return Trainable.of(spec, section, dict(parameter_shapes(spec)))


def trained(*freeze: str, tied: bool = False) -> set[str]:
    own = rule(*freeze, tied=tied)
    return {name for name, _ in parameter_shapes(tiny_spec(tie_word_embeddings=tied)) if own.trains(name)}


def test_parts_modules_and_globs_name_parameters() -> None:
    everything = trained()
    assert not any(name.startswith("vision.") for name in everything)
    assert trained("vision") == everything
    assert trained("llm") == {name for name in everything if name.startswith("connector.")}
    assert trained("connector", "model") == {"lm_head.weight"}
    assert everything - trained("model.layers.1") == {name for name in everything if ".layers.1." in name}
    assert everything - trained("*.mlp") == {name for name in everything if ".mlp." in name}
    assert everything - trained("*norm*") == {name for name in everything if "norm" in name}


def test_a_tied_head_is_the_embedding() -> None:
    own = rule("model.embed_tokens", tied=True)
    assert not own.trains("lm_head.weight") and own.trains("model.norm.weight")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"freeze": ["visoin"]}, r"train.freeze: 'visoin' matches no parameter \(did you mean 'vision'\?\)"),
        ({"freeze": ["model.layer.0"]}, r"did you mean 'model.layers.0'"),
        ({"lr_of": {"conector": 1e-3}}, r"train.lr_of: 'conector' matches no parameter \(did you mean 'connector'"),
        ({"lr_of": {"vision": 1e-3}}, r"everything that 'vision' names is frozen: set model.vision.frozen to false"),
        ({"freeze": ["llm"], "lr_of": {"lm_head": 1e-3}}, r"everything that 'lm_head' names is frozen"),
        ({"freeze": ["llm", "connector"]}, r"train.freeze=llm, connector leaves nothing to train"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(train: dict[str, Any], said: str) -> None:
    spec = tiny_spec()
    with pytest.raises(UserError, match=said):
        Trainable.of(spec, TrainSection.model_validate(train), dict(parameter_shapes(spec)))


def test_the_last_pattern_sets_the_rate() -> None:
    own = rule(lr=1e-4, lr_of={"llm": 1e-5, "model.layers.*": 2e-5, "connector": 1e-3})
    labels = {name: own.label(name) for name, _ in parameter_shapes(tiny_spec()) if own.trains(name)}
    assert labels["model.norm.weight"] == "llm" and labels["model.layers.0.mlp.up_proj.weight"] == "model.layers.*"
    scales = own.scales(labels)
    assert list(scales) == ["connector", "llm", "model.layers.*"]
    assert scales == pytest.approx({"connector": 10.0, "llm": 0.1, "model.layers.*": 0.2})
    assert rule().scales(labels) == {"connector": 1.0, "llm": 1.0}


def test_lists_and_rates_are_given_on_the_command_line() -> None:
    train = parse(["--train.freeze", "llm, vision", "--train.lr-of", "connector=1e-2,model.layers.*=1e-4"]).config.train
    assert train.freeze == ["llm", "vision"] and train.lr_of == {"connector": 1e-2, "model.layers.*": 1e-4}
    with pytest.raises(UserError, match=r"train.lr_of.*not a list of PATTERN=RATE pairs"):
        parse(["--train.lr-of", "connector"])
    with pytest.raises(UserError, match=r"steps=3 and epochs=1 are both set"):
        parse(["--train.steps", "3", "--train.epochs", "1"])
    with pytest.raises(UserError, match="schedule=wsd needs decay_steps"):
        parse(["--train.schedule", "wsd"])
    with pytest.raises(UserError, match="decay_steps=3 needs schedule=wsd"):
        parse(["--train.decay-steps", "3"])
    assert RunConfig().train.schedule == "cosine"


def test_counts_and_costs_follow_the_rule() -> None:
    spec = tiny_spec()
    everything = ParamCounts.of(spec)
    connector = ParamCounts.of(spec, rule("llm").trains)
    assert connector.trained.total == everything.connector and connector.total == everything.total
    last = spec.layers - 1
    assert connector.of_stage([last], first=False, last=True)[0] == 0
    shares = {"image_share": 0.1, "target_share": 0.3, "recomputed": False}
    before, *layers, after = connector.part_costs(**shares)
    full_before, *full_layers, full_after = everything.part_costs(**shares)
    assert before == full_before, "the connector is trained in both"
    for cost, full in ((layers[0], full_layers[0]), (after, full_after)):
        assert cost.forward == full.forward and cost.backward == full.backward / 2, "no gradients of weights"
    first_frozen = ParamCounts.of(spec, rule("connector", "model.embed_tokens", "model.layers.0").trains)
    before, *layers, after = first_frozen.part_costs(**shares)
    assert before.backward == layers[0].backward == 0 and layers[1:] == full_layers[1:] and after == full_after
