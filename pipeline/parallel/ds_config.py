"""The DeepSpeed configuration of a run: the user's JSON file, completed with what the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, RunConfig

_OWNED = {
    "train_batch_size": "train.batch_packs",
    "train_micro_batch_size_per_gpu": "parallel.micro_batches",
    "gradient_accumulation_steps": "parallel.micro_batches",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "the train section (AdamW)",
    "scheduler": "train.warmup_steps and train.min_lr",
    "bf16": "train.dtype",
    "fp16": "train.dtype (bf16; fp16 is not supported)",
    "pipeline": "parallel.pp",
    "tensorboard": "log.tensorboard",
}


def read_ds_config(path: str) -> dict[str, Any]:
    """Read the user's DeepSpeed file. Raises ConfigError: missing, bad JSON, a key the recipe owns, not ZeRO-3."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed {path}: {error.strerror}; shipped files are in ds_configs/") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed {path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--deepspeed {path}: must hold a JSON object, not a {type(raw).__name__}")
    for key, owner in _OWNED.items():
        if raw.get(key, "auto") != "auto":
            raise ConfigError(f"--deepspeed {path}: '{key}' is set by the recipe: remove it and use {owner}")
    zero = raw.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.stage={zero.get('stage')}: this trainer runs ZeRO stage 3"
        )
    return {key: value for key, value in raw.items() if key not in _OWNED}


def complete_ds_config(raw: dict[str, Any], config: RunConfig, *, micro_packs: int, bf16: bool) -> dict[str, Any]:
    """Return the configuration handed to ``deepspeed.initialize``.

    Micro-batching is the schedule's: DeepSpeed sees one accumulation step and would otherwise divide by their number
    again on every stage. ``gradient_clipping`` is always explicit because DeepSpeed's default is 1.0, not off.
    """
    done = {
        **raw,
        "train_micro_batch_size_per_gpu": micro_packs,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_norm,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        done["bf16"] = {"enabled": True}
        done["data_types"] = {"grad_accum_dtype": "fp32", **raw.get("data_types", {})}
    if config.log.tensorboard:
        done["tensorboard"] = {"enabled": True, "output_path": config.run_dir, "job_name": "tensorboard"}
    return done
