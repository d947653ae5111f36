"""A vision tower of a model, resolved: its config, its preprocessing and the folder of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import one_line
from pipeline.config.schema import ConfigError, TowerConfig
from pipeline.model.connectors import Features
from pipeline.model.families.configs import config_from_dict, vision_config
from pipeline.model.families.registry import VISION_FAMILIES
from pipeline.model.families.vision import VisionFamily
from pipeline.model.limits import LIMITS, read_json
from pipeline.model.preprocess import Preprocess
from pipeline.model.starting_point import StartingPoint


@dataclass(frozen=True)
class Tower:
    """One vision tower."""

    config: PreTrainedConfig
    preprocess: Preprocess
    source: str = ""
    """Folder with its weights; empty = from scratch."""
    whole: bool = False
    """It keeps parts whose output is unused."""

    @classmethod
    def resolve(cls, config: TowerConfig, key: str, start: StartingPoint | None = None) -> Tower:
        """Check a tower of a recipe, or that of a starting point; ``key`` names it in messages.

        Raises ConfigError naming the key and the fix.
        """
        made = vision_config(config, key, None if start is None else start.family.vision(start.config))
        family = VISION_FAMILIES[made.model_type]
        side = config.size_px or family.size_px(made)
        if 0 in family.grid(made, side) or side > LIMITS["image_size"]:
            raise ConfigError(f"{key}.size_px={side}: give at least one patch, at most {LIMITS['image_size']} pixels")
        if start is not None:
            pixels = _preprocess(start.image_processor, start.source, made, side, start.resample)
            return cls(made, pixels, whole=True)
        path = Path(config.source) / "preprocessor_config.json"
        saved = read_json(path) if config.source and path.is_file() else {}
        return cls(made, _preprocess(saved, str(path), made, side), config.source)

    @property
    def family(self) -> VisionFamily:
        """All that is special about its family."""
        return VISION_FAMILIES[self.config.model_type]

    @property
    def features(self) -> Features:
        """Width and grid of its patch features."""
        grid = self.family.grid(self.config, self.preprocess.size_px)
        return Features(int(self.config.hidden_size), grid)

    def meta(self) -> PreTrainedModel:
        """Return the tower on the meta device, without the parts whose output is unused.

        Raises ConfigError when its config cannot be built.
        """
        with torch.device("meta"), config_errors("model.vision"):
            return self.family.build(self.config, whole=self.whole)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready description, without the source folder."""
        vision = json.loads(self.config.to_json_string(use_diff=False))
        whole = {"whole": True} if self.whole else {}
        return {"vision": vision, "preprocess": self.preprocess.to_dict(), **whole}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Tower:
        """Rebuild a tower from :meth:`to_dict`. Raises ConfigError, or KeyError or ValueError when it is damaged."""
        config = config_from_dict(raw["vision"], VISION_FAMILIES)
        tower = cls(config, Preprocess.from_dict(raw["preprocess"]), whole=bool(raw.get("whole")))
        side = tower.preprocess.size_px
        if 0 in tower.family.grid(tower.config, side) or not 0 < side <= LIMITS["image_size"]:
            raise ValueError(f"preprocess.size_px {side}")
        return tower


@contextmanager
def config_errors(key: str) -> Iterator[None]:
    """Report what transformers finds only while building (an unknown activation, say) as an error of the config."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{key}: its config cannot be built ({type(error).__name__}: {one_line(error)})") from error


def _preprocess(
    saved: Mapping[str, Any], where: str, vision: PreTrainedConfig, size_px: int, resample: str = ""
) -> Preprocess:
    """Return mean and std as saved if stated, else those that the tower's family was trained with; so is the filter.

    Raises ConfigError naming ``where``.
    """
    family = VISION_FAMILIES[vision.model_type]
    try:
        mean = saved.get("image_mean") or family.mean
        std = saved.get("image_std") or family.std
        return Preprocess(size_px, _channels(mean), _channels(std), resample or family.resample)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: the image processor is damaged ({one_line(error)}): copy it again") from error


def _channels(values: Any) -> tuple[float, float, float]:
    """Return one number per channel. Raises ValueError or TypeError."""
    red, green, blue = map(float, values)
    return red, green, blue
