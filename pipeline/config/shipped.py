"""Files that ship with the project and are found by name from any folder: DeepSpeed files and Slurm templates.

They lie in the top-level folders ``ds_configs`` and ``slurm`` of a checkout, and inside the package once installed
(see ``setup.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_prep.common.errors import did_you_mean
from pipeline.config.schema import ConfigError

_PACKAGE = Path(__file__).parents[1]


def shipped_folder(name: Literal["ds_configs", "slurm"]) -> Path:
    """Return the folder of DeepSpeed files or Slurm templates."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def ds_config_names() -> list[str]:
    """Return the names of the shipped DeepSpeed files: zero1, zero2, zero3, ..."""
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))


def ds_config_path(name: str) -> Path:
    """Return the file of a shipped name such as ``zero3``, or of a path, which has a slash or ends in .json.

    Raises ConfigError with the closest name if there is no such file.
    """
    names = ds_config_names()
    if "/" in name or name.endswith(".json"):
        if not Path(name).is_file():
            hint = f" (shipped as '{Path(name).stem}')" if Path(name).stem in names else ""
            raise ConfigError(f"--deepspeed {name}: no such file{hint}; shipped: {', '.join(names)}")
        return Path(name)
    if name not in names:
        raise ConfigError(f"unknown DeepSpeed file '{name}'{did_you_mean(name, names)}; shipped: {', '.join(names)}")
    return shipped_folder("ds_configs") / f"{name}.json"
