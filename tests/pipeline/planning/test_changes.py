"""Which settings may change on resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_prep.common.errors import UserError
from pipeline.checkpoints.manifest import CheckpointManifest
from pipeline.config.schema import RunConfig, known_keys
from pipeline.planning.changes import (
    CHANGES_RESULT,
    check_allowed_keys,
    is_allowed,
    refuse_changes,
    settings_changed,
)
from pipeline.planning.run_plan import count_steps

ACCEPTED = {"parallel", "checkpoint", "eval", "log", "run_dir", "init_from", "data", "model"}
"""Sections of which no key but those in `CHANGES_RESULT` changes the result; of train and mask, these keys do not."""
ACCEPTED_KEYS = {"train.gradient_checkpointing", "train.seed", "train.deterministic", "train.max_skipped_steps",
                 "train.max_hours", "mask.allow_leak", "mask.prove_rows"}  # fmt: skip


def manifest(config: dict[str, Any]) -> CheckpointManifest:
    return CheckpointManifest(
        step=3, optimizer_steps=3, consumed_packs=12, plan_sha256="0", global_batch_size=4, pp=1, dp=1, config=config,
        model={"spec": {"llm": {}}, "dtype": "float32"},
    )  # fmt: skip


def changed(old: dict[str, Any], new: dict[str, Any], *, plan: str = "0", dtype: str = "float32") -> list[str]:
    saved = manifest(RunConfig.model_validate(old).model_dump())
    changes = settings_changed(saved, RunConfig.model_validate(new), plan_sha256=plan, dtype=dtype)
    return [f"{change}{'!' if change.changes_result else ''}" for change in changes]


def test_a_key_newer_than_the_checkpoint_had_its_default() -> None:
    old = RunConfig().model_dump()
    del old["mask"]["layers"]
    for layers, wanted in (("", []), ("0:1=causal", ["mask.layers"])):
        new = RunConfig.model_validate({"mask": {"layers": layers}})
        changes = settings_changed(manifest(old), new, plan_sha256="0", dtype="float32")
        assert [change.key for change in changes if change.changes_result] == wanted


def test_every_key_is_classified() -> None:
    """A new key of the schema must be put into one class or the other."""
    keys = {key for key, section in known_keys().items() if section is None}
    assert keys >= CHANGES_RESULT
    rest = {key for key in keys - CHANGES_RESULT if key.partition(".")[0] not in ACCEPTED}
    assert rest == ACCEPTED_KEYS


def test_changes_are_named_with_both_values() -> None:
    old = {"run_dir": "a", "model": {"llm": {"config": {"hidden_size": 8}}}}
    assert changed(old, {**old, "run_dir": "b"}) == []
    assert changed(old, {"train": {"lr": 1e-3}, "log": {"every_steps": 7}}) == [
        "log.every_steps: 10 -> 7", "model.llm.config.hidden_size: 8 -> None", "train.lr: 2e-05 -> 0.001!",
    ]  # fmt: skip


def test_what_is_trained_and_at_which_rate_is_part_of_the_result() -> None:
    new = {"train": {"freeze": ["llm"], "lr_of": {"connector": 1e-3}, "schedule": "linear", "epochs": 2.0}}
    assert changed({}, new) == [
        "train.epochs: 0.0 -> 2.0!", "train.freeze: [] -> ['llm']!", "train.lr_of: {} -> {'connector': 0.001}!",
        "train.schedule: 'cosine' -> 'linear'!",
    ]  # fmt: skip


def test_packs_may_move_and_the_type_may_be_spelled_otherwise_but_neither_may_change() -> None:
    old, new = {"data": {"packs": "a"}}, {"data": {"packs": "b"}, "train": {"dtype": "fp32"}}
    assert changed(old, new) == ["data.packs: 'a' -> 'b'", "train.dtype: 'auto' -> 'fp32'"]
    assert changed(old, old, plan="1", dtype="bfloat16") == [
        "data.packs: '0' -> '1'!", "train.dtype: 'float32' -> 'bfloat16'!"
    ]  # fmt: skip


def test_a_change_of_the_result_is_refused_unless_it_is_allowed() -> None:
    saved, now = manifest(RunConfig().model_dump()), RunConfig.model_validate({"train": {"lr": 1e30, "beta1": 0.5}})
    changes = settings_changed(saved, now, plan_sha256="0", dtype="float32")
    with pytest.raises(
        UserError, match=r"train.lr: 2e-05 -> 1e\+30.*add --allow-change train.beta1 --allow-change train"
    ):
        refuse_changes("here", changes, [])
    with pytest.raises(UserError, match=r"\(train.beta1: 0.9 -> 0.5\)"):
        refuse_changes("here", changes, ["train.lr"])
    refuse_changes("here", changes, ["train"])
    assert not is_allowed("train.lr_x", ["train.lr"])
    with pytest.raises(UserError, match=r"--allow-change train.lrr: there is no such key"):
        check_allowed_keys(["train.lrr"])


@pytest.mark.parametrize(
    ("train", "steps"), [({}, 12), ({"epochs": 1}, 12), ({"epochs": 0.25}, 3), ({"epochs": 2.5}, 30), ({"steps": 7}, 7)]
)
def test_the_length_is_given_in_steps_or_epochs(train: dict[str, Any], steps: int) -> None:
    config = RunConfig.model_validate({"train": {"global_batch_size": 8, **train}})
    assert count_steps(config, cast(Any, SimpleNamespace(rows=103))) == steps


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"steps": 13}, "plan more epochs with mma-prep, repeat the rows with train.epochs, or lower train.steps"),
        ({"schedule": "wsd", "decay_steps": 13}, "train.decay_steps=13 is longer than the run of 12 steps"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(train: dict[str, Any], said: str) -> None:
    config = RunConfig.model_validate({"train": {"global_batch_size": 8, **train}})
    with pytest.raises(UserError, match=said):
        count_steps(config, cast(Any, SimpleNamespace(rows=103)))
