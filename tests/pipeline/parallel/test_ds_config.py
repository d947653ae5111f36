"""The DeepSpeed file and the recipe: what they agree on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.common.errors import UserError
from pipeline.config.schema import ParallelConfig, RunConfig
from pipeline.parallel.ds_config import Sharding, complete_ds_config, read_ds_config
from tests.launch import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def shipped(name: str) -> dict[str, Any]:
    return read_ds_config(str(ROOT / f"ds_configs/{name}.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_runs_as_stage_3(name: str) -> None:
    done = complete_ds_config(shipped(name), RunConfig(), microbatch_rows=2, bf16=True)
    assert done["zero_optimization"]["stage"] == 3
    assert done["gradient_clipping"] == RunConfig().train.clip_norm
    whole = done["zero_optimization"]["stage3_param_persistence_threshold"] > 1e12
    assert whole == (name in ("zero1", "zero2"))


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        pytest.param("zero1", {}, "ZeRO-1, weights whole between steps, gradients reduced once a step", id="zero1"),
        pytest.param("zero2", {}, "ZeRO-2, weights whole between steps, gradients reduced every micro", id="zero2"),
        pytest.param("zero3", {}, "ZeRO-3, gathered_fraction 1, gradients reduced once a step", id="zero3"),
        pytest.param(
            "zero3",
            {"gathered_fraction": 0, "reduce_once": False},
            "ZeRO-3, gathered_fraction 0, gradients reduced every",
            id="true",
        ),
        pytest.param("zero3_offload", {}, "optimizer on the CPU", id="offload"),
        pytest.param("zero3_offload_params", {}, "optimizer and parameters on the CPU", id="offload of all"),
    ],
)
def test_the_plan_says_what_is_sharded_and_when(name: str, keys: dict[str, Any], words: str) -> None:
    assert words in str(Sharding.of(shipped(name), ParallelConfig.model_validate(keys)))


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("zero1", {"gathered_fraction": 0.5}, "parallel.gathered_fraction=0.5 needs ZeRO stage 3"),
        ("zero1", {"reduce_once": False}, r"reduce_once=false is ZeRO stage 2, .* says 1: .*zero2"),
        ("zero2", {"reduce_once": True}, r"reduce_once=true is ZeRO stage 1, .* says 2: .*zero1"),
    ],
)
def test_a_recipe_that_contradicts_the_stage_is_refused(name: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sharding.of(shipped(name), ParallelConfig.model_validate(keys))


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({}, "stage=None: this trainer runs stages 1, 2 and 3"),
        ([], "zero_optimization.stage=None"),
        ({"stage": 0}, "stage=0"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size=8 is not supported"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights is not supported"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device=nvme .*use cpu"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "needs offload_optimizer too"),
        (
            {"stage": 3, "offload_optimizer": "cpu"},
            r"zero_optimization.offload_optimizer: expected a mapping of keys \(found 'cpu'\)",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "pin": 1}},
            "key zero_optimization.offload_optimizer.pin",
        ),
        ({"stage": 3, "overlap_com": True}, r"unknown key zero_optimization.overlap_com \(did you mean 'overlap_comm'"),
        (
            {"stage": 3, "reduce_bucket_size": "big"},
            "zero_optimization.reduce_bucket_size: Input should be",
        ),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, "zero_hpz_partition_size=8 is not supported"),
        ({"stage": 3, "zenflow": {"topk_ratio": 0.1}}, "zenflow uses its own optimizer"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio uses"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload uses"),
        ({"stage": 2, "cpu_offload": True}, 'use "offload_optimizer": {"device": "cpu"}'),
    ],
)
def test_zero_settings_that_cannot_be_run_are_refused(zero: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=words):
        read_ds_config(str(path))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data_types": "x"}, 'data_types="x": must be an object'),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, 'data_types.grad_accum_dtype="fp8" is not supported: use fp32'),
        ({"communication_data_type": "fp16"}, 'communication_data_type="fp16" is not supported: use fp32 or bf16'),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer' is set by the recipe"),
        ({"comunication_data_type": "fp32"}, r"'comunication_data_type' does nothing .*mean 'communication_data_type'"),
    ],
)
def test_types_and_keys_that_cannot_be_run_are_refused(keys: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **keys}))
    with pytest.raises(UserError, match=f"--deepspeed {path}: {words}"):
        read_ds_config(str(path))


def test_what_is_left_auto_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """Files written for Hugging Face's trainer are full of it."""
    zero = {"stage": 3, "zero_hpz_partition_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}  # fmt: skip
    owned = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "optimizer": "auto"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "communication_data_type": "fp32", "zero_x": "auto"}))
    kept = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert read_ds_config(str(path)) == {"zero_optimization": kept, "communication_data_type": "fp32"}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **owned}))
    assert read_ds_config(str(path)) == {"zero_optimization": {"stage": 3}}
