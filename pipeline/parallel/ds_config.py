"""The DeepSpeed configuration of a run: the user's JSON file, completed from the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import did_you_mean
from data_prep.common.validation import first_problem
from pipeline.config.schema import ConfigError, ParallelConfig, RunConfig
from pipeline.config.shipped import ds_config_path

_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "parallel.micro_batches",
    "gradient_accumulation_steps": "parallel.micro_batches",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "the train section (AdamW)",
    "scheduler": "train.warmup_steps and train.min_lr",
    "bf16": "train.dtype",
    "fp16": "train.dtype (bf16; fp16 is not supported)",
    "pipeline": "parallel.pp",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}
# DeepSpeed's other settings that have an effect here.
_PASSED_ON = frozenset({
    "zero_optimization", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "comms_logger", "flops_profiler",
    "csv_monitor", "comet", "timers", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
})  # fmt: skip
# These form groups of ranks across pipeline stages; a value of 1 or less turns them off.
_WORLD_WIDE = ("zero_hpz_partition_size", "mics_shard_size")
_RENAMED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_WHOLE = 1 << 60  # more elements than any parameter, or any stage, has


def read_ds_config(path: str) -> dict[str, Any]:
    """Read the user's DeepSpeed file without its "auto" values, which the recipe or DeepSpeed sets.

    Raises:
        ConfigError: The file is missing or not valid JSON, has a key that the recipe sets or that DeepSpeed does not
            know, or has no ZeRO stage.
    """
    try:
        raw = json.loads(ds_config_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed {path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--deepspeed {path}: must hold a JSON object, not a {type(raw).__name__}")
    raw = _without_auto(raw)
    for key, owner in _OWNED.items():
        if raw.pop(key, {}) != {}:
            raise ConfigError(f"--deepspeed {path}: '{key}' is set by the recipe: remove it and use {owner}")
    for key in raw.keys() - _PASSED_ON:
        raise ConfigError(f"--deepspeed {path}: '{key}' does nothing here{did_you_mean(key, _PASSED_ON)}: remove it")
    zero = raw.get("zero_optimization")
    fault = _dtype_fault(raw) or _zero_fault(zero if isinstance(zero, dict) else {})
    if fault:
        raise ConfigError(f"--deepspeed {path}: {fault}")
    return raw


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    parts = ((key, value) for key, value in section.items() if value != "auto")
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in parts}


def _dtype_fault(raw: dict[str, Any]) -> str:
    """Return what is wrong with the types that gradients are accumulated and reduced in; empty if nothing is."""
    types = raw.get("data_types", {})
    if not isinstance(types, dict):
        return f'data_types={json.dumps(types)}: must be an object, as {{"grad_accum_dtype": "fp32"}}'
    named = {"data_types.grad_accum_dtype": types.get("grad_accum_dtype")}
    named["communication_data_type"] = raw.get("communication_data_type")
    for key, value in named.items():
        if value not in (None, "fp32", "bf16"):
            return f"{key}={json.dumps(value)} is not supported: use fp32 or bf16"
    return ""


def _zero_fault(zero: dict[str, Any]) -> str:
    """Return what is wrong with a ``zero_optimization`` section, and the fix; empty if nothing is."""
    if fault := _unknown_to_deepspeed(zero):
        return fault
    fault = _not_run_here(zero)
    return f"zero_optimization.{fault}" if fault else ""


def _unknown_to_deepspeed(zero: dict[str, Any]) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds, which flags alone do not need

    for key, name in _RENAMED.items():
        if key in zero:
            return f'zero_optimization.{key} was renamed: use "{name}": {{"device": "cpu"}}'
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        known = DeepSpeedZeroConfig.model_fields
        return f"{first_problem(error, lambda place: known, within='zero_optimization')}: correct or remove it"
    return ""


def _not_run_here(zero: dict[str, Any]) -> str:
    if zero.get("stage") not in (1, 2, 3):
        return f"stage={zero.get('stage')!r}: this trainer runs stages 1, 2 and 3"
    for key in _WORLD_WIDE:
        if int(zero.get(key, 1)) > 1:
            return f"{key}={zero[key]} is not supported: remove it"
    for key in _QUANTIZED:
        if zero.get(key):
            return f"{key} is not supported: remove it"
    for key in ("offload_optimizer", "offload_param"):
        if _device(zero, key) not in ("none", "cpu"):
            return f"{key}.device={_device(zero, key)} is not supported: use cpu"
    if _device(zero, "offload_param") == "cpu" and zero["stage"] != 3:
        return f"offload_param needs stage 3, stage {zero['stage']} keeps weights on the device: remove it"
    if _device(zero, "offload_param") == "cpu" and _device(zero, "offload_optimizer") != "cpu":
        return "offload_param needs offload_optimizer too: add it"
    offload = zero.get("offload_optimizer") or {}
    others = {
        "zenflow": zero.get("zenflow"),
        "offload_optimizer.super_offload": offload.get("super_offload"),
        "offload_optimizer.ratio": offload.get("ratio", 1) != 1,
    }
    asked = [key for key, on in others.items() if on]
    return f"{asked[0]} uses its own optimizer, which is not supported: remove it" if asked else ""


def _device(zero: dict[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


@dataclass(frozen=True)
class Sharding:
    """What the data-parallel ranks of a stage shard, and when: ZeRO-1, 2 and 3 in one code path.

    Optimizer states and fp32 weights are always sharded. ZeRO-1 and ZeRO-2 are ZeRO-3 with every parameter
    *persistent*: gathered once, right after the optimizer step, and kept until the next.
    """

    stage: int
    """ZeRO stage of the DeepSpeed file."""
    gathered_fraction: float
    """Share of a stage's parameters kept gathered within a step."""
    reduce_once: bool
    """Gradients are reduce-scattered once a step, else once a micro-batch."""
    offload_optimizer: bool
    """Master weights, moments and the update's gradients are in host memory."""
    offload_params: bool
    """Compute-type shards are in host memory."""

    @classmethod
    def of(cls, ds_config: dict[str, Any], parallel: ParallelConfig) -> Sharding:
        """Combine the user's DeepSpeed file with the recipe. Raises ConfigError where they disagree."""
        zero = ds_config["zero_optimization"]
        stage, once = int(zero["stage"]), parallel.reduce_once
        if stage < 3 and parallel.gathered_fraction < 1:
            raise ConfigError(
                f"parallel.gathered_fraction={parallel.gathered_fraction:g} needs ZeRO stage 3; "
                f"ZeRO stage {stage} keeps weights whole: "
                "use --deepspeed zero3, or remove it"
            )
        if stage < 3 and once is not None and once != (stage == 1):
            raise ConfigError(
                f"parallel.reduce_once={str(once).lower()} is ZeRO stage {1 if once else 2}, the DeepSpeed file says "
                f"{stage}: remove it, or use --deepspeed zero{1 if once else 2}"
            )
        offload = (_device(zero, key) == "cpu" for key in ("offload_optimizer", "offload_param"))
        return cls(stage, parallel.gathered_fraction, stage != 2 if once is None else once, *offload)

    def __str__(self) -> str:
        offloaded = {"optimizer": self.offload_optimizer, "parameters": self.offload_params}
        moved = " and ".join(name for name, there in offloaded.items() if there)
        weights = "weights whole between steps" if self.stage < 3 else f"gathered_fraction {self.gathered_fraction:g}"
        reduced = f"gradients reduced {'once a step' if self.reduce_once else 'every micro-batch'}"
        return f"ZeRO-{self.stage}, {weights}, {reduced}" + (f", {moved} on the CPU" if moved else "")


def complete_ds_config(raw: dict[str, Any], config: RunConfig, *, microbatch_rows: int, bf16: bool) -> dict[str, Any]:
    """Return the configuration handed to ``deepspeed.initialize``.

    The schedule runs the micro-batches, so DeepSpeed sees one accumulation step: it would otherwise divide by their
    number on every stage. ``gradient_clipping`` is always set because DeepSpeed's default is 1.0, not off.

    Raises ConfigError where ``log.wandb`` is set and wandb is not installed.
    """
    done = {
        **raw,
        "zero_optimization": _with_plain_linears(_as_stage_3(raw["zero_optimization"]), config.parallel),
        "train_micro_batch_size_per_gpu": microbatch_rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_norm,
        "steps_per_print": 1 << 60,
        # Its throughput timer would synchronize the device before every forward, posted receives included.
        "timers": {"throughput": {"enabled": False}, **raw.get("timers", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        done["bf16"] = {"enabled": True}
        done["data_types"] = {"grad_accum_dtype": "fp32", **raw.get("data_types", {})}
    if config.log.tensorboard:
        done["tensorboard"] = {"enabled": True, "output_path": config.run_dir, "job_name": "tensorboard"}
    if config.log.wandb:
        if find_spec("wandb") is None:
            raise ConfigError(f"log.wandb={config.log.wandb} needs the package wandb: pip install wandb, or clear it")
        done["wandb"] = {"enabled": True, "project": config.log.wandb}
    return done


def _with_plain_linears(zero: dict[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    """Keep torch's own linear function where weights stay gathered for the step.

    DeepSpeed replaces it, in Python, by one that does not keep a released weight in memory until the backward.
    """
    return {"memory_efficient_linear": False, **zero} if parallel.gathered_fraction == 1 else zero


def _as_stage_3(zero: dict[str, Any]) -> dict[str, Any]:
    """Express ZeRO-1 and ZeRO-2 as ZeRO-3 that keeps every parameter gathered between steps."""
    if zero["stage"] == 3:
        return zero
    kept = {"stage3_param_persistence_threshold": _WHOLE, "stage3_model_persistence_threshold": _WHOLE}
    return {**zero, "stage": 3, **kept}
